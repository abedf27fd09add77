"""Process groups, devices and collectives; the only layer that reads megatron's global state."""

from megatron_croc.parallel import device as device  # installs the CPU stand-in where needed
