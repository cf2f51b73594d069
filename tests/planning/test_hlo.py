"""Figures read from a compiled program, and from the program before compilation."""

import jax
import jax.numpy as jnp
import pytest

from persona_jax.models.attention import attention
from persona_jax.planning import hlo
from persona_jax.planning.hlo import Collective
from persona_jax.runtime.mesh import make_mesh, traced_for

HLO = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%body.7 (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %permuted = f32[64]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0}}
  %gathered = (f32[32]{0}, f32[64]{0}) all-gather-start(%r), replica_groups=[4,2]<=[8]
  %done = f32[64]{0} all-gather-done(%gathered)
}

%cond (p: (s32[], f32[64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%all-reduce-scatter.3 (p: bf16[16,4]) -> bf16[2,4] {
  %inner = bf16[16,4]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups={}, to_apply=%add
}

%never (p: f32[]) -> f32[] {
  %unused = f32[1000]{0} all-reduce(%p), to_apply=%add
}

ENTRY %main.9 (a: f32[4]) -> f32[4] {
  %all-reduce.1 = (bf16[4,128]{1,0:T(4,128)(2,1)S(1)}, /*index=1*/f32[10]{0}) all-reduce(%a, %b), \
replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_0','axis_1'}, to_apply=%add
  %reduced = f32[8]{0} reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add
  %fused = bf16[2,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
  %loop = (s32[], f32[64]) while(%init), condition=%cond, body=%body.7
  ROOT %again = (s32[], f32[64]) while(%init), condition=%cond, body=%body.7, \
backend_config={"known_trip_count":{"n":"2"}}
}
"""


def test_collectives_of_a_program():
    assert hlo.collectives(HLO, 8) == [
        Collective("all-gather", 2, 7, 7 * 256),
        Collective("all-reduce", 8, 1, 4 * 128 * 2 + 40),
        Collective("collective-permute", 8, 7, 7 * 256),
        Collective("reduce-scatter", 4, 1, 4 * 32),
        Collective("reduce-scatter", 8, 1, 128),
    ]


def test_a_ring_sends_each_share_but_its_own():
    assert Collective("all-reduce", 4, 1, 1000).sent == 1500
    assert Collective("all-gather", 4, 1, 1000).sent == 750
    assert Collective("collective-permute", 4, 1, 1000).sent == 1000


def test_collectives_of_this_machines_compiler():
    mesh = make_mesh()
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=spread)
    text = jax.jit(lambda x: x.sum(axis=0)).lower(x).compile().as_text()
    assert hlo.collectives(text, 8) == [Collective("all-reduce", 8, 1, 128)]


def test_loops_count_once_per_iteration():
    def function(x, w):
        x = jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=9)[0]
        return jax.lax.platform_dependent(
            x, cpu=lambda x: jax.lax.map(lambda row: row @ w, x), default=lambda x: x @ w
        )

    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    jaxpr = jax.jit(function).trace(shape, shape).jaxpr.jaxpr
    assert hlo.loop_factor(jaxpr, "tpu") == pytest.approx((9 + 1) / (1 + 1))
    # Row by row: each iteration computes an eighth of the product.
    assert hlo.loop_factor(jaxpr, "cpu") == pytest.approx((9 + 1) / (1 + 1 / 8))


def test_what_kernels_compute_is_counted_where_they_do_not_say(monkeypatch):
    """The gradient of the TPU's attention kernel: seven matrix products."""
    shape = (4, 2048, 2, 40)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def gradient(q, k, v):
        with traced_for(make_mesh(devices=jax.devices()[:2])):
            return jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(
                q, k, v
            )

    here = jax.jit(gradient).trace(x, x, x).jaxpr.jaxpr
    assert hlo.kernel_flops(here, "cpu") == 0
    monkeypatch.setattr("persona_jax.models.attention.platform", lambda: "tpu")
    jaxpr = jax.jit(lambda *qkv: gradient(*qkv)).trace(x, x, x).jaxpr.jaxpr
    batch, length, heads, dim = shape
    product = 2 * (batch // 2) * heads * length**2 * dim
    assert hlo.kernel_flops(jaxpr, "tpu") == 7 * product
