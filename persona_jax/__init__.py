"""persona_jax: pictures of one particular person, from a handful of photos and a prompt, in JAX."""

__version__ = "0.1.0"
