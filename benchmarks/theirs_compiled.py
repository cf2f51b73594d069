"""The items in PyTorch with torch.compile, channels last, as diffusers' documentation advises."""

import functools

from benchmarks import theirs

make = functools.partial(theirs.make, compiled=True)
device_memory = theirs.device_memory
