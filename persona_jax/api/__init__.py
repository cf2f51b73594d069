"""The Python API; its names are imported from :mod:`persona_jax` itself."""
