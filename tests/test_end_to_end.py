"""The main commands as a user runs them, at the smallest size: base, adapter, pictures, errors."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from world import adapter_config, base_config, write_people

from persona_jax import pretrain, sample, train
from persona_jax.errors import UserError
from persona_jax.interop.checkpoints import load_params, newest_step
from persona_jax.runtime.command_line import run_with_arguments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(people, data_dir, pipeline, workdir of a trained adapter)."""
    root = tmp_path_factory.mktemp("world")
    people, data_dir = write_people(root / "people"), root / "data"
    pretrain.main(base_config(people, data_dir), root / "base")
    pipeline = root / "base" / "pipeline"
    train.main(adapter_config("sa", people, data_dir, pipeline), root / "sa")
    return people, data_dir, pipeline, root / "sa"


def generate(world, out, *flags: str, photos: int = 3) -> None:
    people, _, _, workdir = world
    chosen = [str(people / "person_0" / f"{i}.png") for i in range(photos)]
    argv = ["sample", "--workdir", str(workdir), "--out", str(out), "--steps", "2"]
    run_with_arguments(sample.parser(), sample.main, [*argv, *flags, "--photos", *chosen])


def test_base_report_and_pictures(world):
    base = world[2].parent
    report = json.loads((base / "report.json").read_text())
    assert set(report) == {"vae", "clip"}
    assert 0 <= report["clip"]["auc"] <= 1
    assert Image.open(base / "unet" / "grid_000002.png").size[0] > 16


def test_a_finished_base_is_left_alone(world, capsys):
    people, data_dir, pipeline, _ = world
    pretrain.main(base_config(people, data_dir), pipeline.parent)
    assert "finished" in capsys.readouterr().out


def test_run_leaves_what_the_readme_says(world):
    workdir = world[3]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)
    # Three references, the target and two samples, of one person.
    width, height = Image.open(workdir / "grids" / "step_000003.png").size
    assert (width, height) == (6 * 18 + 2, 18 + 2 + 14)
    assert (workdir / "config.json").exists()
    assert sorted(p.name for p in (workdir / "example").iterdir()) == ["1.png", "2.png", "3.png"]


def test_stock_diffusers_opens_the_base(world):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(world[2])
    image = theirs(
        "a photo of a person", num_inference_steps=2, height=16, width=16, output_type="np"
    ).images
    assert image.shape == (1, 16, 16, 3)


def test_sampling_repeats_and_more_pictures_change_none(world, tmp_path):
    generate(world, tmp_path / "a", "--num", "2", "--seed", "5")
    generate(world, tmp_path / "b", "--num", "2", "--seed", "5")
    generate(world, tmp_path / "c", "--num", "3", "--batch_size", "2", "--seed", "5")
    generate(world, tmp_path / "d", "--num", "2", "--seed", "6")
    first = [(tmp_path / run / "0000.png").read_bytes() for run in "abcd"]
    assert first[0] == first[1] == first[2]
    assert first[0] != first[3]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "0000.png", "0001.png", "0002.png", "grid.png", "sample.json",
    ]  # fmt: skip
    record = json.loads((tmp_path / "a" / "sample.json").read_text())
    assert record["seed"] == 5
    assert [one["weights"] for one in record["sets"]] == [[1.0, 1.0, 1.0]]


def test_weight_zero_is_leaving_the_photo_out(world, tmp_path):
    generate(world, tmp_path / "a", "--weights", "1", "1", "0", "--num", "1")
    generate(world, tmp_path / "b", "--weights", "1", "1", "--num", "1", photos=2)
    a, b = (np.asarray(Image.open(tmp_path / run / "0000.png"), int) for run in "ab")
    assert abs(a - b).max() <= 1


def test_attribution_weighs_the_photos_and_leaves_each_out(world, tmp_path):
    flags = ["--num", "2", "--weights", "1", "2", "0"]
    generate(world, tmp_path / "a", *flags, "--attribution")
    attribution = json.loads((tmp_path / "a" / "sample.json").read_text())["attribution"]
    # A query of zeros attends to each photo by its weight; three steps hardly change that.
    np.testing.assert_allclose(attribution["shares"], [1 / 3, 2 / 3, 0], atol=0.05)
    np.testing.assert_allclose(
        np.mean(attribution["heads"], axis=0), attribution["shares"], atol=1e-3
    )
    assert attribution["influence"][2] is None
    assert all(moved >= 0 for moved in attribution["influence"][:2])
    assert Image.open(tmp_path / "a" / "attribution.png").size == (3 * 98 + 2, 2 * 98 + 16)


def test_attribution_of_one_photo_is_refused(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        generate(world, tmp_path, "--attribution", "--num", "1", photos=1)
    assert stop.value.code == 2
    assert "two photos or more" in capsys.readouterr().err


def test_long_prompt_is_cut_with_a_warning(world, tmp_path, capsys):
    generate(world, tmp_path / "a", "--num", "1", "--prompt", "very " * 100 + "long")
    assert "cut to 77" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--weights", "1"], "--weights"),
        (["--weights", "1", "-1", "1"], "--weights"),
        (["--num", "0"], "--num"),
        (["--steps", "2000"], "steps=2000"),
        (["--crop", "2"], "crop"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_wrong_flags_are_one_line(world, tmp_path, capsys, flags, word):
    with pytest.raises(SystemExit) as stop:
        generate(world, tmp_path, *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert word in error


def run_sample(*argv: str) -> None:
    run_with_arguments(sample.parser(), sample.main, ["sample", *argv])


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_sampling_refuses_a_broken_photo(world, tmp_path, capsys, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    flags = ["--workdir", str(world[3]), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        run_sample(*flags, "--photos", str(tmp_path / "broken.jpg"))
    assert stop.value.code == 2
    assert "broken.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_photo_is_refused(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_sample("--workdir", str(world[3]), "--out", str(tmp_path), "--photos")
    assert stop.value.code == 2
    assert "--photos" in capsys.readouterr().err


def test_init_from_takes_the_adapter_and_a_fresh_aggregator(world, tmp_path, capsys):
    people, data_dir, pipeline, workdir = world
    plain = adapter_config("ip", people, data_dir, pipeline)
    plain.optimizer.steps = 1
    train.main(plain, tmp_path / "ip")
    config = adapter_config("sa", people, data_dir, pipeline)
    config.init_from = str(tmp_path / "ip")
    config.optimizer.steps = 1
    train.main(config, tmp_path / "sa")
    assert "fresh one" in capsys.readouterr().out
    config.init_from = str(workdir)
    train.main(config, tmp_path / "again")
    assert "fresh one" not in capsys.readouterr().out


def test_another_configuration_is_refused(world):
    people, data_dir, pipeline, workdir = world
    with pytest.raises(UserError, match="max"):
        train.main(adapter_config("max", people, data_dir, pipeline), workdir)
    assert json.loads((workdir / "config.json").read_text())["aggregator"]["kind"] == (
        "self_attention"
    )


def test_an_unreadable_photo_is_skipped_with_a_count(world, tmp_path, capsys):
    people = write_people(tmp_path / "people")
    (people / "person_2" / "9.png").write_bytes(b"")
    config = adapter_config("avg", people, tmp_path / "data", world[2])
    config.optimizer.steps = 1
    train.main(config, tmp_path / "avg")
    assert "1 files are left out: person_2/9.png" in capsys.readouterr().out


def test_training_and_sampling_never_import_torch_or_tensorflow(world, tmp_path):
    people, data_dir, pipeline, _ = world
    (tmp_path / "quick.py").write_text(
        f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from world import adapter_config
def get_config():
    paths = Path({str(people)!r}), Path({str(data_dir)!r}), Path({str(pipeline)!r})
    return adapter_config("avg", *paths)
"""
    )
    code = f"""
import sys
from persona_jax import pretrain, sample, train
from persona_jax.runtime.command_line import run_with_arguments, run_with_config
flags = ["--config", {str(tmp_path / "quick.py")!r}, "--workdir", {str(tmp_path / "avg")!r}]
run_with_config(train.main, ["train", *flags])
flags = ["--workdir", {str(tmp_path / "avg")!r}, "--out", {str(tmp_path / "out")!r}]
photo = {str(people / "person_0/0.png")!r}
run_with_arguments(sample.parser(), sample.main, ["sample", *flags, "--photos", photo])
bad = {{"torch", "diffusers", "tensorflow"}} & set(sys.modules)
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert (tmp_path / "out" / "grid.png").exists()


def test_overfits_one_batch(world):
    """The adapter overfits one fixed batch: its loss falls far below the initial one."""
    from persona_jax.methods import adapter_training
    from persona_jax.pipelines.image_encoders import open_image_encoder
    from persona_jax.pipelines.pipeline import open_pipeline
    from persona_jax.training.state import make_optimizer

    people, data_dir, pipeline, _ = world
    config = adapter_config("sa", people, data_dir, pipeline)
    config.drop.update({"image": 0.0, "text": 0.0, "both": 0.0})
    config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.0})
    parts = open_pipeline(config)
    dim = open_image_encoder(config, parts).dim
    draw = np.random.default_rng(0)
    batch = {
        "moments": draw.normal(size=(8, 8, 8, 8)).astype(np.float32),
        "tokens": np.repeat(parts.tokenize(["a photo of a person"])[0], 8, axis=0),
        "embeddings": draw.normal(size=(8, 3, dim)).astype(np.float32),
        "mask": np.ones((8, 3), np.float32),
        "index": np.arange(8, dtype=np.int32),
    }
    loss_fn, optimizer = (
        adapter_training.adapter_loss(config, parts),
        make_optimizer(config.optimizer),
    )
    params, frozen = (
        adapter_training.init_adapter(config, parts, dim),
        adapter_training.adapter_frozen_params(parts),
    )

    @jax.jit
    def step(params, state, frozen, batch):
        # Always step 0, for the same noise and timesteps.
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch, 0)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(150):
        params, state, loss = step(params, state, frozen, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


# --- meshes, processes, kills ---------------------------------------------------------------


def test_a_step_is_the_same_on_every_mesh(world):
    from persona_jax.methods import adapter_training
    from persona_jax.pipelines.pipeline import open_pipeline
    from persona_jax.runtime.mesh import make_mesh, place, put_batch, shard_params
    from persona_jax.training.state import init_state, make_optimizer, make_step

    people, data_dir, pipeline, _ = world
    config = adapter_config("sa", people, data_dir, pipeline)
    parts, draw = open_pipeline(config), np.random.default_rng(0)
    batch = {
        "moments": draw.normal(size=(8, 8, 8, 8)).astype(np.float32),
        "tokens": np.repeat(parts.tokenize(["a photo of a person"])[0], 8, axis=0),
        "embeddings": draw.normal(size=(8, 3, 16)).astype(np.float32),
        "mask": (draw.random((8, 3)) < 0.7).astype(np.float32),
        "index": np.arange(8, dtype=np.int32),
    }
    optimizer, frozen = (
        make_optimizer(config.optimizer),
        adapter_training.adapter_frozen_params(parts),
    )

    def after_one_step(mesh):
        state = init_state(adapter_training.init_adapter(config, parts, 16), optimizer, mesh)
        step = make_step(adapter_training.adapter_loss(config, parts), optimizer, mesh)
        on_mesh = place(frozen, shard_params(mesh, frozen))
        if mesh.size == 1:
            placed = jax.device_put(batch, mesh.devices.flat[0])
        else:
            placed = put_batch(mesh, batch)
        state, metrics = step(state, on_mesh, placed)
        return float(metrics["loss"]), jax.tree.leaves(jax.device_get(state.params))

    axis_types = (jax.sharding.AxisType.Auto,) * 2
    single = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"), axis_types=axis_types
    )
    loss, params = after_one_step(single)
    for sizes in ((8, 1), (4, 2), (1, 8)):
        other_loss, other = after_one_step(make_mesh(*sizes))
        assert other_loss == pytest.approx(loss, rel=1e-5)
        # Adam's first step is ±learning rate: gradients near 0 may differ in sign through rounding.
        moved = [np.abs(a - b).max() for a, b in zip(params, other, strict=True)]
        assert max(moved) < 1e-4


TRAIN = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from world import adapter_config
from persona_jax import train
config = adapter_config("sa", *map(Path, {paths!r}))
config.optimizer.steps, config.save_every = 8, 2
train.main(config, Path(sys.argv[1]))
"""


def start(world, workdir, devices: int, **environment: str) -> subprocess.Popen:
    tests = str(Path(__file__).parent)
    code = TRAIN.format(tests=tests, paths=[str(path) for path in world[:3]])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)],
        env=os.environ
        | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors[-2000:]


def losses(workdir) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


def test_killed_and_resumed_equals_left_alone(world, tmp_path):
    finish(start(world, tmp_path / "whole", devices=1))
    process = start(world, tmp_path / "killed", devices=1)
    deadline = time.monotonic() + 300
    while process.poll() is None and newest_step(tmp_path / "killed/checkpoints") is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    finish(start(world, tmp_path / "killed", devices=1))
    for which in ("params", "ema"):
        whole, killed = (
            jax.tree.leaves_with_path(load_params(tmp_path / run / "checkpoints", which))
            for run in ("whole", "killed")
        )
        assert [path for path, _ in whole] == [path for path, _ in killed]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(whole, killed, strict=True))


def test_two_processes_of_four_devices_equal_one_of_eight(world, tmp_path):
    finish(start(world, tmp_path / "one", devices=8))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        start(
            world,
            tmp_path / "two",
            devices=4,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    for process in pair:
        finish(process)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
