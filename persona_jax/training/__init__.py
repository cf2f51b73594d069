"""Training state, training loop and its logs."""
