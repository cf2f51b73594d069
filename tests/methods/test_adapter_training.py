"""Adapter training on a mesh that splits the frozen towers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_models
from world import adapter_config, write_people

from persona_jax import train
from persona_jax.pipelines.pipeline import open_pipeline
from persona_jax.runtime import mesh as mesh_of
from persona_jax.runtime.mesh import gathered, make_mesh


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_people(root / "people")
    torch_models.write_pipeline(root / "base")
    return root


def config(world: Path):
    found = adapter_config("sa", world / "people", world / "data", world / "base")
    found.aggregator.pooling_heads = 3
    return found


def test_frozen_towers_are_loaded_in_parts(world, monkeypatch):
    """Each device has its eighth of what divides, and the values are the file's."""
    monkeypatch.setattr(mesh_of, "SMALL", 64)
    whole, split = open_pipeline(config(world)), open_pipeline(config(world), make_mesh(1, 8))
    for name in ("unet", "text_encoder"):
        parts, there = 0, 0
        leaves = (jax.tree.leaves(getattr(found, name).params) for found in (split, whole))
        for leaf, expected in zip(*leaves, strict=True):
            shards = [shard.data for shard in leaf.addressable_shards]
            assert len({shard.device for shard in leaf.addressable_shards}) == 8
            if leaf.size >= 64 and any(side % 8 == 0 for side in leaf.shape):
                assert all(shard.size * 8 == leaf.size for shard in shards)
                parts += leaf.size
            there += leaf.size
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected))
        assert parts > 0.8 * there
    # What each process runs for itself stays on one device.
    for name in ("vae", "image_encoder"):
        assert all(
            len(leaf.sharding.device_set) == 1
            for leaf in jax.tree.leaves(getattr(split, name).params)
        )
    back = gathered({"unet": split.unet.params, "vae": split.vae.params})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(back["unet"]))
    assert jax.tree.leaves(back["vae"])[0] is jax.tree.leaves(split.vae.params)[0]


def test_training_on_split_towers_has_the_same_losses_and_grids(world, tmp_path, monkeypatch):
    monkeypatch.setattr(mesh_of, "SMALL", 64)
    found = {}
    for fsdp in (1, 8):
        chosen = config(world)
        chosen.mesh.fsdp = fsdp
        train.main(chosen, tmp_path / str(fsdp))
        lines = (tmp_path / f"{fsdp}/metrics.jsonl").read_text().splitlines()
        found[fsdp] = [json.loads(line)["loss"] for line in lines]
        assert list((tmp_path / f"{fsdp}/grids").glob("*.png"))
    assert len(found[1]) == 3
    np.testing.assert_allclose(found[8], found[1], rtol=1e-5)
