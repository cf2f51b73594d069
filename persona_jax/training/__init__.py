"""Mesh and sharding, training state, training loop."""
