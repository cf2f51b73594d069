import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from persona_jax.errors import UserError
from persona_jax.interop.checkpoints import Checkpoints, load_params, newest_step
from persona_jax.runtime import checksums


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any = None


def mesh(data, fsdp):
    axes = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axes)


def state(step, sharding=None, ema=True, width=2048):
    """A state whose names have dots, and a pair that would collide if paths were joined by dots."""
    sharding = sharding or NamedSharding(mesh(4, 2), P("fsdp"))
    random = np.random.default_rng(step)

    def draw(*shape):
        return jax.device_put(random.normal(size=shape).astype(np.float32), sharding)

    params = {
        "down_blocks.0": {"attentions.1": {"to_k.weight": draw(8, width)}},
        "down_blocks": {"0.bias": draw(8)},
        "half": draw(8, 4).astype(jnp.bfloat16),
    }
    whole = NamedSharding(sharding.mesh, P())
    opt_state = jax.tree.map(
        lambda x: jax.device_put((x + random.normal(size=x.shape)).astype(x.dtype), whole),
        optax.adam(1).init(params),
    )
    return State(jax.device_put(np.int32(step), whole), params, opt_state, params if ema else None)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def save(directory, *steps):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))


def largest(folder):
    """Returns the file with the arrays (orbax keeps them in folders named d), or the only file."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return max([p for p in files if p.parent.name == "d"] or files, key=lambda p: p.stat().st_size)


def test_restores_what_was_saved_on_another_mesh(tmp_path):
    save(tmp_path, 3, 5, 9)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 9
        for like in (mesh(1, 8), mesh(8, 1)):
            sharding = NamedSharding(like, P("fsdp"))
            got = checkpoints.restore(state(0, sharding))
            equal(got, state(9))
            assert {x.sharding.mesh for x in jax.tree.leaves(got)} == {like}
            assert got.params["down_blocks"]["0.bias"].sharding == sharding
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "9"]
    assert newest_step(tmp_path) == 9


def test_saving_while_the_state_is_donated_and_overwritten(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    big = jax.device_put(np.ones((512, 4096), np.float32), NamedSharding(mesh(4, 2), P("fsdp")))
    moving = State(state(1).step, {"a": big}, {"b": big + 1})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, moving)
        params = overwrite(moving.params)
        jax.block_until_ready(params)
        assert moving.params["a"].is_deleted()
    np.testing.assert_array_equal(load_params(tmp_path)["a"], np.ones((512, 4096)))


def test_an_empty_folder(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(state(0)) is None
    assert newest_step(tmp_path / "absent") is None
    with pytest.raises(UserError, match="no checkpoint here"):
        load_params(tmp_path / "absent")


def test_load_params_needs_no_template(tmp_path):
    save(tmp_path, 1, 2)
    equal(load_params(tmp_path, "params"), jax.tree.map(np.asarray, state(2).params))
    equal(load_params(tmp_path, "ema"), jax.tree.map(np.asarray, state(2).ema))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(load_params(tmp_path)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state(3, ema=False))
    with pytest.raises(UserError, match="holds no 'ema'"):
        load_params(tmp_path, "ema")


def flip(file, place, bit):
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(bytes(data))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's
def test_no_flipped_bit_is_read(tmp_path, capfd):
    """After a flip of any bit, the previous checkpoint is read, and one line says so."""
    save(tmp_path / "whole", 1, 2)
    files = [p for p in sorted((tmp_path / "whole/2").rglob("*")) if p.is_file()]
    sizes = np.asarray([p.stat().st_size for p in files], float)
    random = np.random.default_rng(0)
    # Every file once, and 30 more drawn by size.
    chosen = [*range(len(files)), *random.choice(len(files), 30, p=sizes / sizes.sum())]
    for number, i in enumerate(chosen):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        name = files[i].relative_to(tmp_path / "whole")
        flip(copy / name, int(random.integers(sizes[i])), int(random.integers(8)))
        capfd.readouterr()
        tree = load_params(copy)
        if name.parts[1] in ("params", "meta"):
            equal(tree, jax.tree.map(np.asarray, state(1).params))
            assert f"{copy / '2'}: damaged ({'/'.join(name.parts[1:])} is not as" in (
                capfd.readouterr().err
            )
        elif name.parts[1] in ("ema", "opt_state"):
            equal(tree, jax.tree.map(np.asarray, state(2).params))  # was not read
        if name.parts[1] in ("params", "meta", "ema", "opt_state") and number % 3 == 0:
            with Checkpoints(copy) as checkpoints:
                equal(checkpoints.restore(state(0)), state(1))
            assert "is not as it was written" in capfd.readouterr().err
        shutil.rmtree(copy)


def test_poisoned_states_are_neither_saved_nor_read(tmp_path, capfd):
    save(tmp_path, 1)
    bad = state(2)
    bad.params["half"] = bad.params["half"] * 0 + 1e30
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"step 2: params\.half .* 1e\+30; .*is not saved"):
            checkpoints.save(2, bad)
        checkpoints.save(2, state(2))
    assert newest_step(tmp_path) == 2
    # A checkpoint from before states were checked.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("persona_jax.interop.checkpoints.poison", lambda trees: None)
        with Checkpoints(tmp_path, keep=9) as checkpoints:
            checkpoints.save(3, bad.replace(step=state(3).step))
            checkpoints.save(4, bad.replace(step=state(4).step))
    equal(load_params(tmp_path), jax.tree.map(np.asarray, state(2).params))
    with Checkpoints(tmp_path) as checkpoints:
        equal(checkpoints.restore(state(0)), state(2))
    warnings = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(warnings) == 4
    assert all("damaged (params.half has a number of magnitude 1e+30)" in x for x in warnings)


@pytest.mark.parametrize("name", ["mine [1]", "a\\b", "all*", "why?", "[!x]", os.fsdecode(b"\xff")])
def test_folders_named_like_patterns(tmp_path, name):
    """Names that Orbax or tensorstore would take for a pattern or another path."""
    folder = tmp_path / name / "c"
    (tmp_path / "allies/c").mkdir(parents=True)  # what the pattern would match
    save(folder, 1, 2, 3)
    assert saved(folder) == ["2", "3"]
    equal(load_params(folder), jax.tree.map(np.asarray, state(3).params))
    with Checkpoints(folder) as checkpoints:
        equal(checkpoints.restore(state(0)), state(3))
    assert {p.name for p in tmp_path.iterdir()} == {name, "allies"}


def saved(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_may_not_be_read_is_not_set_aside(tmp_path, monkeypatch):
    save(tmp_path / "c", 1, 2)

    def refused(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(checksums, "digest", refused)
    with pytest.raises(UserError, match=r"c/2: checkpoint cannot be read \(Permission denied\)"):
        load_params(tmp_path / "c")
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(UserError, match="cannot be read"),
    ):
        checkpoints.restore(state(0))
    assert saved(tmp_path / "c") == ["1", "2"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's
@pytest.mark.parametrize("item", ["params", "opt_state", "meta"])
@pytest.mark.parametrize("size", [0, 40])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, capfd, item, size):
    save(tmp_path / "c", 1, 2)
    victim = largest(tmp_path / "c" / "2" / item)
    victim.write_bytes(victim.read_bytes()[:size])
    if item == "params":
        equal(load_params(tmp_path / "c"), jax.tree.map(np.asarray, state(1).params))
        assert "damaged" in capfd.readouterr().err
    with Checkpoints(tmp_path / "c") as checkpoints:
        equal(checkpoints.restore(state(0)), state(1))
        assert f"{tmp_path}/c/2: damaged" in capfd.readouterr().err
        checkpoints.save(2, state(2))  # the step is free again
        checkpoints.wait()
        equal(checkpoints.restore(state(0)), state(2))
    assert (tmp_path / "c.damaged" / "2").exists()


def test_a_missing_file_falls_back_and_all_damaged_is_an_error(tmp_path):
    save(tmp_path / "c", 1, 2)
    largest(tmp_path / "c" / "2" / "opt_state").unlink()
    with Checkpoints(tmp_path / "c") as checkpoints:
        equal(checkpoints.restore(state(0)), state(1))
    largest(tmp_path / "c" / "1" / "params").unlink()
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(UserError, match="no checkpoint can be read"),
    ):
        checkpoints.restore(state(0))


def test_another_configuration_lists_every_difference(tmp_path):
    with Checkpoints(tmp_path, fingerprint={"method": "sa", "depth": 2}) as checkpoints:
        checkpoints.save(1, state(1))
    other = state(1, width=32, ema=False)
    other.params["new"] = {"bias": other.params["down_blocks"].pop("0.bias")}
    with Checkpoints(tmp_path, fingerprint={"method": "avg", "depth": 2}) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore(other)
        text = str(error.value)
        for part in (
            "missing params.new.bias",
            "unexpected params.down_blocks.0.bias",
            "params.down_blocks.0.attentions.1.to_k.weight: saved float32[8,2048], "
            "expected float32[8,32]",
            "unexpected ema.half",
            "method: saved 'sa', now 'avg'",
        ):
            assert part in text
        assert "depth" not in text
        assert "\n" not in text
    assert newest_step(tmp_path) == 1  # refused, not set aside


def program(text, *arguments):
    """Runs a program with this file's imports and functions; returns its stdout and stderr."""
    text = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + HEAD + text
    command = [sys.executable, "-c", text, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, done.stderr


HEAD = """
import resource
import jax, numpy as np
from test_checkpoints import Checkpoints, State, UserError
def state(size):
    return State(jax.numpy.int32(0), {"a": jax.numpy.asarray(np.random.rand(size))}, ())
checkpoints = Checkpoints(sys.argv[1])
"""

FULL = """
checkpoints.save(1, state(1000))
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    checkpoints.save(2, state(2**20))
    checkpoints.wait()
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    """A limit on file size imitates a full disk: the write fails half-way."""
    out, err = program(FULL, tmp_path)
    assert out.count("\n") == 1, err
    assert "checkpoint of step 2 could not be written: " in out
    assert err == ""
    assert newest_step(tmp_path) == 1
    assert load_params(tmp_path)["a"].shape == (1000,)


def test_falling_back_is_one_line(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            params = {"a": jax.numpy.asarray(np.random.default_rng(step).normal(size=1000))}
            checkpoints.save(step, State(jax.numpy.int32(step), params, ()))
    victim = largest(tmp_path / "c" / "2" / "params")
    victim.write_bytes(victim.read_bytes()[:50])
    out, err = program("print(int(checkpoints.restore(state(1000)).step))", tmp_path / "c")
    assert out == "1\n", err
    assert err.count("\n") == 1
    assert "damaged (" in err
