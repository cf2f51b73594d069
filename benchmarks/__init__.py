"""Times persona_jax beside PyTorch diffusers: ``python -m benchmarks``."""
