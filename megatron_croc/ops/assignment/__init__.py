r"""Assignment of pool tokens to the visual tokens that they replace.

features [B, n, D], pool [P, D]
    |  pairwise_cost (float32, also under autocast)
    v
cost [B, n, P] --> assign  --> index [B, n]   one-to-one, minimum total cost (paper; ViCToR code)
               \-> nearest --> index [B, n]   many rows may take one column (released Croc code)

Backends of `assign`, each exact:

    solve.py           entry points: checks, choice of a backend, objective and bound
    on_gpu.py          triton: all images of a call at once, without waiting for the device
    triton_kernel.py   its kernel, imported only where it runs
    on_cpu.py          cpu (images in threads) and scipy (the reference)
    native.py          compiled search for cpu (native.cpp), where there is a C++ compiler
    restricted.py      search in a part of the cost, for cpu without a compiler
    shortest_paths.py  torch: readable reference of the algorithm of the kernel
    start.py           initial dual variables, for triton and torch
    bounds.py          lower bound on the optimum from an assignment (weak duality)
"""

from megatron_croc.ops.assignment.cost import pairwise_cost
from megatron_croc.ops.assignment.solve import (
    Assignment,
    Backend,
    assign,
    choose_backend,
    nearest,
    optimality_gap,
)

__all__ = [
    "Assignment",
    "Backend",
    "assign",
    "choose_backend",
    "nearest",
    "optimality_gap",
    "pairwise_cost",
]
