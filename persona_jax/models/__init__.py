"""Pure Flax modules: no I/O, no config files, no logging."""
