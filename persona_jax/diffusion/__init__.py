"""Pure functions of diffusion: noise schedule, loss, sampler."""
