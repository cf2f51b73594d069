"""An opened pipeline folder: towers, image encoders, and generation from noise to pixels."""
