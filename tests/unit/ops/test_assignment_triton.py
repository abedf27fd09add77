"""The Triton kernel: its arithmetic in the interpreter, its compilation for a GPU not at hand.

What only a GPU shows, races between warps, is in test_assignment_gpu.
"""

import os
import subprocess
import sys

import pytest
import torch

from megatron_croc.ops.assignment import assign, on_gpu
from tests.support.assignment import KINDS, NUM_ROWS, check_optimal, made

pytest.importorskip("triton", reason="Triton is not installed; it comes with CUDA builds of torch")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of tests.support.interpreted_triton."""
    file = tmp_path_factory.mktemp("triton") / "results.pt"
    command = [sys.executable, "-m", "tests.support.interpreted_triton", str(file)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.parametrize("kind", KINDS)
def test_the_guarantee(kind, interpreted):
    index, objective, bound, solved = interpreted["results"][kind]
    cost = made(kind)
    assert solved.all() and index.dtype == torch.int64 and index.shape == cost.shape[:2]
    for matrix, *result in zip(cost, index, objective, bound, strict=True):
        check_optimal(matrix, *(part.tolist() for part in result))


def test_images_of_different_length(interpreted):
    index, objective, *_ = interpreted["results"]["ragged"]
    for image, length in enumerate([NUM_ROWS, 7, 0, 1]):
        alone = assign(made("randn")[[image % 2], :length])
        assert torch.equal(index[image, :length], alone.index[0])
        assert (index[image, length:] == -1).all()
        assert objective[image] == alone.objective[0]


def test_images_that_are_not_finite_come_back_unsolved(interpreted):
    index, *_, solved = interpreted["results"]["not finite"]
    assert solved.tolist() == [True, False, True, False]
    assert (index[[1, 3]] == -1).all() and (index[[0, 2]] >= 0).all()


def test_the_edges_of_what_is_allowed(interpreted):
    results = interpreted["results"]
    assert results["large"][0].tolist() in ([[0, 2]], [[1, 2]])
    assert torch.equal(results["float64"][0], results["randn"][0])
    assert results["no images"][0].shape == (0, 12)


def test_the_kernel_takes_the_steps_of_the_reference(interpreted):
    ours, reference = interpreted["steps"].T
    assert torch.equal(ours, reference) and ours.max() > 10


@pytest.mark.parametrize("num_warps", [1, 4, 8, 16])
def test_it_compiles_for_hopper_and_stores_only_at_the_end(num_warps):
    """Any number of warps is safe, because no stored value is loaded later."""
    ptx = compiled(num_columns=2048, num_warps=num_warps)
    first_store = ptx.index("st.global")
    assert "ld.global" in ptx[:first_store]
    assert "ld.global" not in ptx[first_store:]
    assert "atom." not in ptx


def compiled(num_columns, num_warps):
    import triton
    from triton.backends.compiler import GPUTarget

    types = dict.fromkeys(("lengths", "start_row_of", "unmatched", "num_unmatched"), "*i32")
    types |= {"cost": "*fp32", "initial_duals": "*fp64", "duals": "*fp64", "index": "*i64"}
    types |= {"num_steps": "*i32", "num_rows": "i32", "num_columns": "i32"}
    source = triton.compiler.ASTSource(
        fn=on_gpu._kernel(),
        signature={**types, "NUM_PADDED": "constexpr"},
        constexprs={"NUM_PADDED": num_columns},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps}).asm["ptx"]
