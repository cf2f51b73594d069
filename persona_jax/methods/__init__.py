"""What is trained: adapters on sets of photos, and fine-tuning per person (DreamBooth, LoRA)."""
