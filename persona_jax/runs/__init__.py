"""A finished run opened to generate with, reference sets, attribution, diffusers as reference."""
