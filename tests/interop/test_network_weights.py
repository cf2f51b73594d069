"""Weights files of Inception and FaceNet: strict loading, and no code in them is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import save_file

from persona_jax.errors import UserError
from persona_jax.interop.network_weights import load_facenet, load_inception
from persona_jax.interop.tensors import torch_name, torch_shape
from persona_jax.models.facenet import FaceNet


@pytest.fixture(scope="module")
def state():
    """Returns FaceNet's tensors as facenet-pytorch publishes them."""
    blank = jax.ShapeDtypeStruct((1, 160, 160, 3), jnp.float32)
    tree = jax.eval_shape(FaceNet().init, jax.random.key(0), blank)["params"]
    shapes = {
        torch_name(path): torch_shape(path, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(tree).items()
    }
    filled = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}
    extra = {
        "logits.weight": (8631, 512),
        "logits.bias": (8631,),
        "last_bn.num_batches_tracked": (),
    }
    return filled | {name: np.zeros(shape, np.float32) for name, shape in extra.items()}


def save(state, file):
    torch.save({name: torch.tensor(array) for name, array in state.items()}, file)
    return file


def test_reads_both_kinds_of_file(state, tmp_path):
    save(state, tmp_path / "net.pt")
    save_file(state, tmp_path / "net.safetensors")
    one, other = load_facenet(tmp_path / "net.pt"), load_facenet(tmp_path / "net.safetensors")
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert sum(x.size for x in jax.tree.leaves(one)) == sum(
        a.size for n, a in state.items() if not n.startswith("logits") and "batches" not in n
    )
    assert one["last_linear"]["kernel"].shape == (1792, 512)


def test_what_does_not_fit_is_named(state, tmp_path):
    wrong = dict(state)
    wrong["last_linear.bias"] = wrong.pop("last_linear.weight")
    with pytest.raises(UserError, match=r"missing: last_linear.weight.*unexpected: last_linear.b"):
        load_facenet(save(wrong, tmp_path / "net.pt"))
    with pytest.raises(UserError, match="do not fit") as error:
        load_inception(save(state, tmp_path / "face.pt"))
    assert any("Mixed_5b" in line for line in error.value.details)


class Trap:
    """Runs code when it is unpickled without protection."""

    def __reduce__(self):
        return (print, ("ran",))


def test_nothing_in_a_file_is_run(tmp_path, capsys):
    torch.save({"conv": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="more than tensors"):
        load_facenet(tmp_path / "trap.pt")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 1000])
def test_cut_short(state, tmp_path, keep):
    file = save(state, tmp_path / "net.pt")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a readable state dict") as error:
        load_facenet(file)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_inception(tmp_path / "none.pth")
