"""The three stages of training a base: VAE, CLIP pair, UNet."""
