"""Metrics of generated images and of embeddings."""
