"""Backends and flash kernels on a CUDA device: `pytest -m gpu tests/unit/ops`."""

import pytest
import torch

from megatron_croc.ops.attention import attend
from megatron_croc.ops.attention.backends import _BACKENDS
from megatron_croc.ops.attention.contract import QKV, FlashOutput
from megatron_croc.ops.attention.dense import attend_formula
from megatron_croc.ops.attention.flash import _KERNELS
from megatron_croc.ops.attention.flip import attend_flip
from megatron_croc.ops.attention.position_ops import choose_position_ops
from megatron_croc.ops.attention.torch_position_ops import TORCH_POSITION_OPS
from megatron_croc.ops.mixed_mask import MixedMask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MASK = MixedMask.build(
    [0, 1, 300, 911, 1000], [(35, 227), (227, 228), (335, 900), (911, 1000)], length=1024
)


def draw(num_heads, num_groups, dim, dtype, length=1024):
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, n, dim) for n in (num_heads, num_groups, num_groups)]
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to("cuda", dtype).requires_grad_() for x in drawn]


def errors(out, tensors, mask):
    """(ours, the formula's in the same dtype) of output and gradients, against float64."""
    n, scale = mask.bounds[-1], tensors[0].shape[-1] ** -0.5
    weight = torch.randn(out[:n].shape, generator=torch.Generator().manual_seed(1)).cuda()

    def results(y, leaves):
        grads = torch.autograd.grad(y[:n], leaves, weight.to(y.dtype))
        return [x.double() for x in (y[:n], *grads)]

    def formula(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        return results(attend_formula(*leaves, mask.visible(), softmax_scale=scale), leaves)

    exact = formula(torch.float64)
    both = zip(results(out, tensors), formula(out.dtype), exact, strict=True)
    return [tuple((x - truth).norm().item() for x in (ours, plain)) for ours, plain, truth in both]


@pytest.mark.parametrize("kernel", _KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 64), ((4, 1), 128), ((2, 2), 256)])
def test_the_flip_is_as_good_as_the_formula(kernel, dtype, heads, dim):
    tensors = draw(*heads, dim, dtype)
    if (reason := kernel.unsupported_reason(tensors[0])) is not None:
        pytest.skip(reason)
    mask = MASK.to("cuda")
    out = attend_flip(*tensors, mask.flip, softmax_scale=dim**-0.5, flash=kernel)
    assert (out[1000:] == 0).all()
    for ours, formula in errors(out, tensors, mask):
        assert ours <= 2 * formula


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "dim"), [((4, 4), 64), ((6, 2), 96), ((4, 1), 256)])
def test_triton_moves_positions_as_torch_does(dtype, heads, dim):
    pytest.importorskip("triton")
    tensors, call = draw(*heads, dim, dtype), MASK.to("cuda").flip.flipped
    kernels = choose_position_ops(tensors[0])
    assert kernels is not TORCH_POSITION_OPS
    inputs = QKV(*(x.detach() for x in tensors))
    lse = torch.randn(heads[0], 1024, device="cuda")
    found = []
    for operations in (kernels, TORCH_POSITION_OPS):
        output = FlashOutput(inputs.query.clone(), lse.clone())
        taken = operations.gather(inputs, call)
        grad, gathered = operations.gather_outputs(output.out, output, call.queries)
        more = FlashOutput(taken.query, gathered.lse + 1.0)
        operations.merge(output, more, call.queries)
        totals = QKV(*(x.clone() for x in inputs))
        operations.add(totals, taken, call)
        found.append(([*taken, grad, *gathered], [output.out, *totals], output.lse))
    for ours, torchs in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(ours, torchs)
    epsilon = 4 * torch.finfo(dtype).eps
    for ours, torchs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, torchs, rtol=epsilon, atol=epsilon)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-5)


def test_positions_past_two_to_the_31_elements_are_gathered():
    """32 heads of 128 at 600k positions: offsets do not fit in 32 bits."""
    pytest.importorskip("triton")
    length = 600_000
    mask = MixedMask.build([0, length], [(length - 8, length)]).to("cuda")
    wide = torch.zeros(length, 32, 128, dtype=torch.bfloat16, device="cuda")
    wide[-8:] = torch.arange(8, device="cuda", dtype=torch.bfloat16)[:, None, None]
    taken = choose_position_ops(wide).gather(QKV(wide, wide, wide), mask.flip.flipped)
    assert taken.query[:, 31, 127].tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert taken.key[:, 31, 127].tolist() == [7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("name", ["flex", "fa4", "ffa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_backend_is_as_good_as_the_formula(name, dtype, dim):
    tensors, mask = draw(4, 2, dim, dtype), MASK.to("cuda")
    if (reason := _BACKENDS[name].unsupported_reason(tensors[0])) is not None:
        pytest.skip(reason)
    out = attend(*tensors, mask, softmax_scale=dim**-0.5, backend=name)
    assert out.isfinite().all()
    for ours, formula in errors(out, tensors, mask):
        assert ours <= 2 * formula + 1e-6


@pytest.mark.parametrize("name", ["flip", "flex", "fa4", "ffa"])
def test_chunks_of_a_backend_are_rows_of_the_whole(name):
    query, key, value = draw(4, 2, 128, torch.bfloat16)
    if (reason := _BACKENDS[name].unsupported_reason(query)) is not None:
        pytest.skip(reason)
    mask, chunks = MASK.to("cuda"), ((100, 356), (640, 896))
    whole = attend(query, key, value, mask, softmax_scale=0.1, backend=name)
    mine = torch.cat([torch.arange(begin, end) for begin, end in chunks]).cuda()
    out = attend(query[mine], key, value, mask, softmax_scale=0.1, backend=name, chunks=chunks)
    torch.testing.assert_close(out, whole[mine], rtol=2e-2, atol=2e-2)


def test_padding_is_zero_whatever_memory_held_before():
    mask = MASK.to("cuda")
    for _ in range(20):
        garbage = [torch.full((1024, 4, 64), torch.nan, device="cuda") for _ in range(8)]
        del garbage
        tensors = draw(4, 2, 64, torch.bfloat16)
        out = attend(*tensors, mask, softmax_scale=0.125, backend="flip")
        out.sum().backward()
        for x in (out, *(tensor.grad for tensor in tensors)):
            assert x.isfinite().all() and (x[1000:] == 0).all()


def test_memory_is_linear_in_the_length():
    peaks = []
    for length in (4096, 8192):
        mask = MixedMask.build([0, length], [(35, length - 300)]).to("cuda")
        tensors = draw(8, 8, 64, torch.bfloat16, length)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        attend(*tensors, mask, softmax_scale=0.125, backend="flip").sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert peaks[1] <= 2.2 * peaks[0]
