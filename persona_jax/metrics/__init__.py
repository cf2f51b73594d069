"""How good a picture or an embedding is."""
