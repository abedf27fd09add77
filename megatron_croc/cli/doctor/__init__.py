"""What is installed, what will be used and why, and what is wrong with this machine or cluster.

installed.py: packages | accelerators.py: what they are used for | environment.py: variables |
memory.py: the run on this machine's memory | machine.py: network, disk, clocks
"""
