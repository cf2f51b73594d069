"""One function, computed in another way on another platform."""

from collections.abc import Callable

import jax
from jaxtyping import Array


def by_platform(**kernels: Callable[..., Array]) -> Callable[..., Array]:
    """A function of arrays that is the kernel of the platform a program is compiled for.

    Its gradient begins from the inputs again: what one platform's kernel would keep for it, a
    program for all of them would make room for on every one.

    Args:
      kernels: by platform ("cpu", "tpu", "cuda"); "default" for the others.
    """

    @jax.custom_vjp
    def run(*inputs: Array) -> Array:
        return jax.lax.platform_dependent(*inputs, **kernels)

    def forward(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        return run(*inputs), inputs

    def gradient(kernel: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
        return lambda cotangent, *inputs: jax.vjp(kernel, *inputs)[1](cotangent)

    def backward(inputs: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
        gradients = {name: gradient(kernel) for name, kernel in kernels.items()}
        return jax.lax.platform_dependent(cotangent, *inputs, **gradients)

    run.defvjp(forward, backward)
    return run
