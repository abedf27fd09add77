"""The Triton backend in Triton's interpreter, which has to be asked for before the import.

TRITON_INTERPRET=1 python -m tests.support.interpreted_triton results.pt
"""

import sys

import torch

from megatron_croc.ops.assignment import assign, on_gpu, shortest_paths, start
from tests.support.assignment import KINDS, check_ties, costs, made


def solve(cost, lengths):
    return assign(cost, lengths, "triton", certify=True)


def solve_all():
    """Every kind of cost, and what else the tests ask about; tensors only."""
    results = {kind: tuple(assign(made(kind), None, "triton", certify=True)) for kind in KINDS}
    for num_values in (1, 2, 3):
        check_ties(solve, num_values, 6)
    cost = made("randn").repeat(2, 1, 1)
    lengths = [cost.shape[1], 7, 0, 1]
    for image, length in enumerate(lengths):
        cost[image, length:] = float("nan")
    results["ragged"] = tuple(assign(cost, lengths, "triton"))
    cost = costs(4, 6, 9)
    cost[1, 2, 0], cost[3, 0, 0] = float("nan"), float("-inf")
    results["not finite"] = tuple(assign(cost, None, "triton", check=False))
    cost = torch.full((1, 2, 3), 3e38)
    cost[0, 1, 2] = 0.0
    results["large"] = tuple(assign(cost, None, "triton"))
    results["float64"] = tuple(assign(made("randn").double(), None, "triton"))
    empty = torch.empty(0, 12, 32)
    results["no images"] = tuple(assign(empty, None, "triton"))
    return results


def count_steps():
    """Values read by kernel and reference from the same start: [kinds, 2]."""
    steps = []
    for kind in ("randn", "correlated", "clustered", "equal rows"):
        cost = made(kind)[:1].double()
        lengths = torch.tensor([cost.shape[1]])
        duals = start.starting_duals(cost, lengths)[0]
        reference = shortest_paths.solve_image(cost[0], duals).num_steps
        steps.append([int(on_gpu.solve_triton(cost, lengths).num_steps[0]), reference])
    return torch.tensor(steps)


if __name__ == "__main__":
    torch.save({"results": solve_all(), "steps": count_steps()}, sys.argv[1])
