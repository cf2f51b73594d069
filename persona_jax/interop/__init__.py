"""File formats: safetensors with torch's names, diffusers folders, adapters, LoRA, checkpoints."""
