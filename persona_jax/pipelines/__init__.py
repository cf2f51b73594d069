"""Loading of pipeline folders, image encoders, and generation from noise to pixels."""
