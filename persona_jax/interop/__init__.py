"""Files of others and our own: torch names, diffusers folders, orbax checkpoints."""
