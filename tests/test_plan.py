"""Plans: the figures of a compiled program, and errors in one line."""

import dataclasses
import json
import math
import re
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world import ROOT, config_of

from persona_jax import plan
from persona_jax.errors import UserError
from persona_jax.methods import finetuning
from persona_jax.models.attention import attention
from persona_jax.models.towers import abstract_params, build
from persona_jax.pipelines.pipeline import open_pipeline
from persona_jax.planning import abstract, chips, compiled, published
from persona_jax.planning.chips import GIB, Chip
from persona_jax.planning.compiled import Compiled
from persona_jax.planning.hlo import Collective
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.mesh import make_mesh, replicated, traced_for
from persona_jax.training.state import init_state, make_optimizer

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="no libtpu")


def test_roofline():
    chip = Chip("toy", hbm=1e9, flops=1e12, bandwidth=1e9, link=1e8, links=4)
    estimate = chips.roofline(chip, 2, 2e12, 1e9, [Collective("all-reduce", 4, 2, 10**8)])
    assert estimate == pytest.approx((2.0, 1.0, 1.5e8 / 2e8))
    assert estimate.step == pytest.approx(2.75)
    assert estimate.share == pytest.approx(0.75 / 2.75)


def test_links_and_cores():
    shapes = {"v5e:2x2": 2, "v5e:16x16": 4, "v5e:4x16": 3, "v5p:2x2x1": 2, "v5p:4x4x8": 6}
    links = {n: chips.links_used(n.split(":")[0], chips.dimensions(n)) for n in shapes}
    assert links == shapes
    half = chips.per_device(chips.CHIPS["v4"], 8, 4)
    assert half.hbm == chips.CHIPS["v4"].hbm / 2


def test_the_largest_batch_lies_on_the_line():
    assert chips.largest_batch((2, 5.0), (4, 8.0), 11.4) == 6
    assert chips.largest_batch((2, 5.0), (4, 8.0), 1.0) == 0
    assert plan.another_batch(6, 2) == 2
    assert plan.another_batch(1, 1) == 2


def test_a_batch_that_does_not_divide_is_rounded_up(capsys):
    config = config_of("sa", "tiny")
    assert plan.batch_per_chip(config, None, 8) == 2
    assert capsys.readouterr().out == ""
    assert plan.batch_per_chip(config, None, 256) == 1
    assert "batch_size=16 does not divide among 256 chips" in capsys.readouterr().out
    config.accumulate = 3
    assert plan.batch_per_chip(config, None, 8) == 3


def test_a_plan_is_made_once(tmp_path):
    result = made()
    calls = []

    def find():
        calls.append(1)
        return result

    for _ in range(2):
        assert compiled.remembered(tmp_path, "key", find) == result
    assert len(calls) == 1
    assert compiled.remembered(tmp_path, "other", find) == result
    assert len(calls) == 2


def test_the_key_of_a_plan_covers_program_device_flags_and_versions(monkeypatch):
    one, two = SimpleNamespace(device_kind="a"), SimpleNamespace(device_kind="b")
    keys = {compiled.program_key("x", one), compiled.program_key("y", one)}
    keys.add(compiled.program_key("x", two))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--some")
    keys.add(compiled.program_key("x", one))
    monkeypatch.setattr(compiled, "_version", lambda name: "another")
    keys.add(compiled.program_key("x", one))
    assert len(keys) == 5


def made(**changes) -> Compiled:
    values = {
        "memory": dict(zip(compiled.MEMORY, (4 * GIB, 2 * GIB, 3 * GIB, GIB, 0), strict=True)),
        "flops": 1e12,
        "accessed": 1e9,
        "optimal_seconds": None,
        "collectives": (Collective("all-reduce", 4, 1, 100),),
        "seconds": 1.0,
    }
    return Compiled(**(values | changes))


def test_a_program_larger_than_the_machine_does_not_fit():
    """A compiler for CPUs accepts programs of any size."""
    machine = plan.Machine("toy", [None], None, 0, 6.0 * GIB)
    assert plan.shortage(made(), machine) == (8.0 * GIB, 6.0 * GIB)
    config = config_of("sa", "tiny")
    assert "out of memory, 8.00 GiB of 6.00 a chip" in plan.advice(config, machine, 2, {2: made()})
    assert plan.shortage(made(), machine._replace(memory=8.0 * GIB)) is None
    told = made(memory={}, shortage=(20.0 * GIB, 16.0 * GIB))
    assert plan.shortage(told, machine) == (20.0 * GIB, 16.0 * GIB)


def test_aliased_memory_counts_once():
    result = made()
    assert result.total == 8 * GIB
    assert Compiled.from_json(json.dumps(dataclasses.asdict(result))) == result


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.50G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm.",
    ],
)
def test_a_shortage_is_read(message):
    assert compiled.shortage_in(message) == (16.5 * GIB, 15.75 * GIB)
    assert compiled.shortage_in("INTERNAL: something else (1G)") is None


def run_plan(*flags: str) -> None:
    run_with_arguments(plan.parser(), plan.main, ["plan", *flags])


def error_of(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run_plan(*flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


SA = str(ROOT / "configs/sa.py")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology", "v9:2x2"], "v9:2x2: not a TPU topology; for example v5e:2x2"),
        (["--topology", "v5e:32x32"], "not a TPU topology"),
        (["--topology", "v5p:2x2"], "not a TPU topology"),
        (["--batch_per_chip=-1"], "batch_per_chip: '-1': expected a whole number from 1 on"),
        (["--batch_per_chip=2", "--config.accumulate=3"], "must be a multiple of accumulate x"),
        (["--config.pipeline=some/other"], "some/other: no such folder, and no sizes known"),
        (["--config.mesh.fsdp=3"], "data x fsdp must be the number of devices"),
        (["--config.remat=all"], "remat='all'; known: none, transformers, blocks"),
        (["--config.batch_sise=3"], "did you mean batch_size"),
        (["--config.image_encoder.kind=dlip"], "known: clip, dlib, facenet"),
        (["--config", str(ROOT / "configs/lora.py"), "--sampler"], "--sampler: .*lora has no adap"),
        (["--topologie=x"], "Unknown command line flag 'topologie'"),
    ],
)
def test_bad_input(capsys, flags, words):
    error = error_of(capsys, "--config", SA, *flags)
    assert re.search(words, error), error


def test_libtpu_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    error = error_of(capsys, "--config", SA, "--topology", "v5e:2x2")
    assert "pip install -e '.[tpu]'" in error


def test_out_of_memory_is_no_traceback(capsys, monkeypatch):
    machine = plan.Machine("v5e:2x2", [None] * 4, chips.CHIPS["v5e"], 2, 16.0 * GIB)
    few, many = made(), made(memory={}, shortage=(20.0 * GIB, 16.0 * GIB))
    monkeypatch.setattr(plan, "topology", lambda name: machine)
    monkeypatch.setattr(plan, "plan", lambda arguments, machine, batch: {4: few, 8: many}[batch])
    monkeypatch.setattr(plan, "page", lambda *_: "page")
    error = error_of(capsys, "--config", SA, "--topology", "v5e:2x2", "--batch_per_chip", "8")
    assert "20.00 GiB of 16.00 a chip, 4.00 too much" in error
    for key in ("batch_per_chip below 8", "accumulate=2", "mesh.fsdp"):
        assert key in error
    (line,) = plan.largest_line({4: few, 8: many}, machine, config_of("sa", "tiny"))
    assert line.startswith("largest batch: 6 a chip, 24 in all; extrapolated")


@pytest.mark.parametrize(
    ("tower", "sizes", "count"),
    [
        *(
            (tower, published.STABLE_DIFFUSION_1_5[tower], count)
            for tower, count in (
                ("unet", 859_520_964),
                ("vae", 83_653_863),
                ("text_encoder", 123_060_480),
            )
        ),
        ("image_encoder", published.CLIP_VIT_H_14, 632_076_800),
    ],
)
def test_published_sizes(tower, sizes, count):
    tree = abstract_params(build(tower, sizes))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == count


def test_the_state_is_the_one_that_training_starts_with():
    config, mesh = config_of("sa", "tiny"), make_mesh(fsdp=2)
    _, (state, frozen, batch) = abstract.training_step(config, mesh, jnp.float32)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.params)
    real = init_state(params, make_optimizer(config.optimizer), mesh, ema=True)
    jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
                 or pytest.fail(f"{a} {b}"), state, real)  # fmt: skip
    assert sorted(frozen) == ["blank", "empty", "text_encoder", "unet"]
    assert batch["embeddings"].shape == (16, 9, 256)


@pytest.mark.parametrize("method", finetuning.METHODS)
def test_the_state_of_several_people_is_the_one_that_training_starts_with(method):
    config, mesh = config_of(method, "tiny"), make_mesh(fsdp=2)
    config.people.at_once, config.batch_size = 3, 8
    _, (state, frozen, batch) = abstract.training_step(config, mesh, jnp.float32)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.params)
    real = init_state(params, finetuning.make_people_optimizer(config), mesh)
    jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
                 or pytest.fail(f"{a} {b}"), state, real)  # fmt: skip
    own = finetuning.init(config, open_pipeline(config), jax.random.split(jax.random.key(0), 3))
    shapes = jax.tree.map(lambda x: x.shape, (own, state.params))
    assert shapes[0] == shapes[1]
    assert sorted(frozen) == ([] if method == "dreambooth" else ["text_encoder", "unet"])
    assert batch["moments"].shape == (8, 3, 16, 16, 16)


@pytest.mark.parametrize("method", finetuning.METHODS)
def test_the_training_of_people_is_planned(capsys, sizes_only, method):
    flags = ("--config", str(ROOT / f"configs/{method}.py"), "--cache", str(sizes_only))
    run_plan(*flags, "--quick", "--batch_per_chip=1", f"--config.pipeline={sizes_only}")
    printed = capsys.readouterr().out
    assert "8 x cpu: 8 devices" in printed
    assert "all-reduce among 8" in printed


def value_of(pattern: str, printed: str) -> float:
    return float(re.search(pattern, printed)[1])


def test_this_machine(capsys, tmp_path):
    flags = ("--config", SA, "--quick", "--cache", str(tmp_path), "--config.aggregator.kind=avg")
    run_plan(*flags)
    printed = capsys.readouterr()
    assert "training step, 8 x cpu: 8 devices, mesh data=8 fsdp=1, 16 examples (2 a chip)" in (
        printed.out
    )
    # The only collective reduces all gradients among all devices.
    config = config_of("avg", "tiny")
    _, (state, _, _) = abstract.training_step(config, make_mesh(), jnp.float32)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    reduced = value_of(r"all-reduce among 8: ([\d.]+) MB", printed.out)
    assert reduced == pytest.approx(4 * trained / 1e6, rel=0.05)
    assert "compiling" in printed.err

    run_plan(*flags)
    again = capsys.readouterr()
    assert again.out == printed.out
    assert "compiling" not in again.err


SMALL = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    },
    "vae": {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    },
    "text_encoder": {
        "vocab_size": 99,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "image_encoder": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
    },
}


@pytest.fixture
def sizes_only(tmp_path):
    """Writes a pipeline folder with configurations but without weights."""
    for tower, sizes in SMALL.items():
        (tmp_path / tower).mkdir()
        (tmp_path / tower / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "scheduler").mkdir()
    scheduler = json.dumps(published.STABLE_DIFFUSION_1_5["scheduler"])
    (tmp_path / "scheduler/scheduler_config.json").write_text(scheduler)
    return tmp_path


@needs_libtpu
def test_a_topology(capsys, sizes_only):
    flags = ("--topology", "v5e:2x2", "--batch_per_chip", "2", "--cache", str(sizes_only / "kept"))
    changes = (f"--config.pipeline={sizes_only}", "--config.aggregator.kind=avg")
    run_plan("--config", SA, *flags, *changes, "--quick")
    printed = capsys.readouterr().out
    assert "v5e:2x2: 4 devices, mesh data=4 fsdp=1, 8 examples (2 a chip), bfloat16" in printed
    assert "of 15.75" in printed
    assert "all-reduce among 4" in printed
    assert value_of(r"estimate: ([\d.]+) ms", printed) > 0


@needs_libtpu
def test_attention_is_lowered_for_the_topology():
    here, there = jax.devices(), plan.topology("v5e:2x2").devices
    for device, chunks in ((here[0], True), (there[0], False)):
        mesh = make_mesh(devices=[device])

        def attend(x, mesh=mesh):
            with traced_for(mesh):
                return attention(x, x, x)

        x = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.bfloat16, sharding=replicated(mesh))
        assert ("stablehlo.while" in jax.jit(attend).lower(x).as_text()) == chunks


def test_a_folder_must_have_its_files(sizes_only):
    (sizes_only / "vae/config.json").unlink()
    config = config_of("sa", "tiny")
    config.pipeline = str(sizes_only)
    with pytest.raises(UserError, match=r"vae/config\.json: missing"):
        abstract.open_abstract(config, jnp.float32)


def test_a_sampler_is_planned(capsys, sizes_only):
    changes = (f"--config.pipeline={sizes_only}", "--config.aggregator.kind=avg")
    flags = ("--sampler", "--quick", "--cache", str(sizes_only), "--config.sampling.steps=3")
    run_plan("--config", SA, *flags, *changes)
    printed = capsys.readouterr().out
    assert "sampler of 3 steps, 8 x cpu: 8 devices" in printed
    assert "16 pictures (2 a chip)" in printed
    assert value_of(r"([\d.]+) GB read", printed) > 0
