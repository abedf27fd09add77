"""The Triton backend on a GPU: what the interpreter cannot see, races between warps above all."""

import pytest
import torch

from megatron_croc.ops.assignment import assign, on_gpu
from megatron_croc.parallel.device import has_cuda
from tests.support.assignment import KINDS, check_optimal, check_ties, made

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device"),
]

WARPS = (1, 4, 8, 16)


def problem(kind, shape, num_images=4):
    """A cost of training's size, on the GPU."""
    num_rows, num_columns = shape
    cost = made(kind, num_rows, num_columns, hidden_size=256, num_images=num_images)
    return cost.cuda()


@pytest.mark.parametrize("kind", KINDS)
def test_the_guarantee(kind):
    cost = made(kind).cuda()
    result = assign(cost, None, "triton", certify=True)
    for matrix, *parts in zip(cost.cpu(), *result[:3], strict=True):
        check_optimal(matrix, *(part.tolist() for part in parts))


@pytest.mark.parametrize("num_values", [1, 2, 3])
def test_any_number_of_ties(num_values):
    def solve(cost, lengths):
        result = assign(cost.cuda(), lengths, "triton", certify=True)
        return type(result)(*(part.cpu() for part in result))

    check_ties(solve, num_values)


@pytest.mark.parametrize("num_warps", WARPS)
@pytest.mark.parametrize("kind", ["randn", "unit", "clustered", "correlated", "ties"])
@pytest.mark.parametrize("shape", [(432, 2048), (547, 2048)], ids=["432x2048", "547x2048"])
def test_every_number_of_warps_is_exact_and_repeats_itself(kind, shape, num_warps):
    cost = problem(kind, shape)
    lengths = torch.full((len(cost),), shape[0], device=cost.device)
    first = on_gpu.solve_triton(cost, lengths, num_warps=num_warps)
    for _ in range(10):
        again = on_gpu.solve_triton(cost, lengths, num_warps=num_warps)
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert first.solved.all()
    for matrix, index, duals in zip(cost, first.index, first.duals, strict=True):
        reduced = matrix.double() - duals
        bound = float(reduced.amin(dim=1).sum() + duals.sum())
        objective = float(matrix.double().gather(1, index[:, None]).sum())
        check_optimal(matrix.cpu(), index.tolist(), objective, bound)


@pytest.mark.parametrize("kind", ["randn", "unit", "clustered", "correlated"])
def test_the_largest_shape_by_its_own_proof(kind):
    """scipy takes up to half a minute here; the lower bound proves as much."""
    cost = problem(kind, (2304, 8192), num_images=2)
    result = assign(cost, None, "triton", certify=True)
    for index, objective, bound in zip(*result[:3], strict=True):
        assert len(index.unique()) == 2304
        assert -1e-9 * objective <= objective - bound <= 1e-6 * objective


def test_nothing_waits_for_the_device():
    cost = problem("randn", (432, 2048))
    expected = assign(cost, None, "triton").index
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = assign(cost, None, "triton", check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result.index, expected)
