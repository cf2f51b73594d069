"""From photos on disk to training batches: dataset builders, captions, examples, loader."""
