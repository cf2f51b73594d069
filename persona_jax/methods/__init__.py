"""Trainable methods: adapters on sets of photos, per-person fine-tuning (DreamBooth, LoRA)."""
