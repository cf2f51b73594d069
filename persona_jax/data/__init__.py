"""From photos on disk to batches: builders, captions, leave-one-out examples, loader."""
