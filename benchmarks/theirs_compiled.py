"""The same of PyTorch with its networks compiled, their convolutions channels last, as diffusers'
pages advise."""

import functools

from benchmarks import theirs

make = functools.partial(theirs.make, compiled=True)
device_memory = theirs.device_memory
