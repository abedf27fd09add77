"""Examination of a machine or cluster: packages, devices, memory, network, disk and clocks.

installed.py: packages | accelerators.py: kernels and devices | environment.py: variables |
memory.py: memory of the run | machine.py: network, disk, clocks
"""
