"""The feature pass: independent of the number of devices; resizing as the standards define it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

from persona_jax.errors import UserError
from persona_jax.evaluation.trait_classifier import HEADS
from persona_jax.metrics.distributions import frechet_distance, moments
from persona_jax.metrics.features import inception_pass, make_pass, resize_clean, resize_legacy
from persona_jax.models import trait_network


def mesh_of(count):
    axes = (jax.sharding.AxisType.Auto,) * 2
    devices = np.array(jax.devices()[:count]).reshape(count, 1)
    return Mesh(devices, ("data", "fsdp"), axis_types=axes)


def test_the_number_of_devices_changes_nothing():
    module = trait_network.TraitNetwork(HEADS)
    params = trait_network.initialise(module, jax.random.key(0), 64)
    random = np.random.default_rng(0)
    one, other = (random.normal(size=(n, 64, 64, 3)).astype(np.float32) for n in (101, 90))

    def distance(count):
        look = make_pass(lambda p, x: module.apply({"params": p}, x)[0], params, mesh_of(count))
        features = look(one)
        assert features.shape == (101, 256)
        return frechet_distance(moments(features), moments(look(other))), features

    (alone, features), *others = (distance(count) for count in (1, 2, 8))
    np.testing.assert_allclose(
        features[:3], module.apply({"params": params}, jnp.asarray(one[:3]))[0], 1e-3
    )
    for shared, rows in others:
        assert abs(shared - alone) <= 1e-9 * alone
        np.testing.assert_array_equal(rows, features)


def test_no_pictures():
    look = make_pass(lambda p, x: x.mean(axis=(1, 2)), {}, mesh_of(1))
    with pytest.raises(UserError, match="no images"):
        look(np.zeros((0, 8, 8, 3), np.float32))


def test_unknown_resize():
    with pytest.raises(UserError, match="'bicubic'"):
        inception_pass({}, mesh_of(1), "bicubic")


@pytest.mark.parametrize("size", [64, 250, 512])
def test_legacy_resize_takes_pixels_from_corner_to_corner(size):
    pictures = np.random.default_rng(1).integers(0, 256, (1, size, size, 3)).astype(np.float32)
    resized = np.asarray(resize_legacy(jnp.asarray(pictures)))
    # Sampled at i · size / 299: grid_sample's coordinates run from corner to corner too.
    at = torch.arange(299) * (size / 299) * (2 / (size - 1)) - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1)[None]
    source = torch.tensor(pictures).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.grid_sample(
        source, grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    np.testing.assert_allclose(resized, wanted.permute(0, 2, 3, 1).numpy(), atol=0.05)


def test_clean_resize_keeps_flat_areas_and_averages_when_it_shrinks():
    flat = np.full((1, 64, 64, 3), 200, np.uint8)
    np.testing.assert_allclose(resize_clean(flat), 200, atol=1e-3)
    checks = np.indices((598, 598)).sum(axis=0) % 2 * 255
    shrunk = resize_clean(np.repeat(checks[None, :, :, None], 3, axis=3).astype(np.uint8))
    # With antialiasing a fine chequerboard becomes grey; without, all black or all white.
    np.testing.assert_allclose(shrunk[0, 8:-8, 8:-8], 127.5, atol=2)
