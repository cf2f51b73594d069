"""Opening of finished runs, reference sets, attribution, and comparison with diffusers."""
