r"""Which pool token stands in for which visual token.

features [B, n, h], pool [P, h]
    |  pairwise_cost (float32 whatever the autocast)
    v
cost [B, n, P] --> assign  --> index [B, n]   one-to-one, least total cost (paper; ViCToR code)
               \-> nearest --> index [B, n]   one column may serve many rows (released Croc code)

Backends of `assign`, each exact:

    solve.py           checks, the choice of a backend, objective and bound
    on_cpu.py          cpu (columns pruned, images in threads) and scipy (the oracle)
    shortest_paths.py  torch: the readable reference of a solver that starts from any prices
    bounds.py          a lower bound on the optimum from an assignment (weak duality)
"""

from megatron_croc.ops.assignment.cost import pairwise_cost
from megatron_croc.ops.assignment.solve import (
    Assignment,
    Backend,
    assign,
    nearest,
    optimality_gap,
)

__all__ = ["Assignment", "Backend", "assign", "nearest", "optimality_gap", "pairwise_cost"]
