r"""Which pool token stands in for which visual token.

features [B, n, h], pool [P, h]
    |  pairwise_cost (float32 whatever the autocast)
    v
cost [B, n, P] --> assign  --> index [B, n]   one-to-one, least total cost (paper; ViCToR code)
               \-> nearest --> index [B, n]   one column may serve many rows (released Croc code)

Backends of `assign`, each exact:

    solve.py           checks, the choice of a backend, objective and bound
    on_gpu.py          triton: every image of a call at once, without waiting for the device
    triton_kernel.py   its kernel, imported only where it runs
    on_cpu.py          cpu (columns pruned, images in threads) and scipy (the oracle)
    shortest_paths.py  torch: the readable reference of what the kernel does
    start.py           duals to start from, for triton and torch
    bounds.py          a lower bound on the optimum from an assignment (weak duality)
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
