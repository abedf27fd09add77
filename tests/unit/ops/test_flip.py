"""The flip on emulated kernels: exact, blind where the mask is, and unharmed by kernel garbage."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from megatron_croc.ops.attention import attend
from megatron_croc.ops.attention.contract import QKV, FlashInputs, FlashOutput
from megatron_croc.ops.attention.dense import attend_formula
from megatron_croc.ops.attention.emulated_flash import EMULATED
from megatron_croc.ops.attention.flex import build_block_mask
from megatron_croc.ops.attention.torch_position_ops import TORCH_POSITION_OPS
from megatron_croc.ops.flip_plan import CausalCall, plan_flip
from megatron_croc.ops.mixed_mask import MixedMask
from tests.support.masks import lay_out, rows

heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)])


def draw(length, num_heads, num_groups, dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, n, dim) for n in (num_heads, num_groups, num_groups)]
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.to(dtype).requires_grad_() for x in drawn]


def run_flip(tensors, mask, chunks=None, scale=0.3, backend="flip"):
    return attend(*tensors, mask, softmax_scale=scale, backend=backend, chunks=chunks)


@pytest.mark.parametrize("backend", ["flip", "dense"])
@given(row=rows, heads=heads, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_outputs_and_gradients_are_the_formulas(backend, row, heads, seed):
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    n = cu[-1]
    ours, reference = draw(length, *heads, seed=seed), draw(length, *heads, seed=seed)
    out = run_flip(ours, mask, backend=backend)
    expected = attend_formula(*reference, mask.visible(), softmax_scale=0.3)
    torch.testing.assert_close(out[:n], expected[:n], rtol=0, atol=1e-12)
    assert (out[n:] == 0).all()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    (out * weight).sum().backward()
    (expected * weight)[:n].sum().backward()
    for tensor, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, rtol=0, atol=1e-11)
        assert (tensor.grad[n:] == 0).all()


@given(rows, heads, st.data())
@settings(max_examples=40, deadline=None)
def test_rows_of_chunks_are_rows_of_the_whole(row, heads, data):
    """Context parallel by gathered keys: shares of the gradients, summed, are the gradients."""
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    cuts = data.draw(st.sets(st.integers(1, length - 1), max_size=3)) if length > 1 else set()
    chunks = list(pairwise([0, *sorted(cuts), length]))
    shares = [held for held in (chunks[0::2], chunks[1::2]) if held]
    whole, cut = draw(length, *heads), draw(length, *heads)
    expected = run_flip(whole, mask)
    expected.square().sum().backward()
    for held in shares:
        positions = torch.cat([torch.arange(*chunk) for chunk in held])
        out = run_flip((cut[0][positions], *cut[1:]), mask, chunks=held)
        torch.testing.assert_close(out, expected[positions], rtol=0, atol=1e-12)
        out.square().sum().backward()
    for tensor, other in zip(cut, whole, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, rtol=0, atol=1e-11)


def test_gradcheck():
    mask = MixedMask.build([0, 6, 9], [(1, 4), (4, 6), (6, 7)], length=10)
    tensors = draw(10, 2, 1, dim=3)
    assert torch.autograd.gradcheck(lambda *x: run_flip(x, mask), tensors)


@pytest.mark.parametrize("backend", ["flip", "dense"])
@given(row=rows)
@settings(max_examples=12, deadline=None)
def test_the_pattern_of_the_jacobian_is_the_mask(backend, row):
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    query, key, value = draw(length, 1, 1, dim=2)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: run_flip((query, key, v), mask, backend=backend).sum(dim=(1, 2)), value
    )
    assert isinstance(jacobian, torch.Tensor)
    visible = mask.visible()
    visible[cu[-1] :] = False
    assert torch.equal(jacobian.abs().amax(dim=(2, 3)) > 0, visible)


def test_a_label_is_not_seen_by_the_position_that_predicts_it():
    """Text after a span: changing token t + 1 changes no output up to t."""
    mask = MixedMask.build([0, 12], [(1, 6)])
    tensors = draw(12, 2, 2)
    with torch.no_grad():
        before = run_flip(tensors, mask)
        for t in range(6, 11):
            changed = [x.clone() for x in tensors]
            for x in changed:
                x[t + 1] += 1.0
            assert torch.equal(run_flip(changed, mask)[: t + 1], before[: t + 1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(use_reentrant):
    mask = MixedMask.build([0, 9, 13], [(1, 4), (4, 7), (9, 13)], length=15)
    plain, recomputed = draw(15, 4, 2), draw(15, 4, 2)
    run_flip(plain, mask).square().sum().backward()
    out = checkpoint(lambda *x: run_flip(x, mask), *recomputed, use_reentrant=use_reentrant)
    assert isinstance(out, torch.Tensor)
    out.square().sum().backward()
    for tensor, other in zip(recomputed, plain, strict=True):
        assert torch.equal(tensor.grad, other.grad)


def test_the_emulated_kernels_leave_garbage_in_padding_and_none_gets_out():
    mask = MixedMask.build([0, 5, 9], [(1, 4), (5, 9)], length=14)
    tensors = draw(14, 2, 1)
    call = mask.flip.causal
    with torch.no_grad():
        inputs = FlashInputs(QKV(*tensors), call, 0.3)
        output = EMULATED.forward(inputs)
        grads = EMULATED.backward(output.out, inputs, output)
    for x in (output.out, output.lse.t(), *grads):  # as the real ones do
        assert x[9:].isnan().all() and x[:9].isfinite().all()
    out = run_flip(tensors, mask)
    out.nansum().backward()
    for x in (out, *(tensor.grad for tensor in tensors)):
        assert x.isfinite().all() and (x[9:] == 0).all()


@pytest.fixture
def poisoned_memory():
    """Every torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["flip", "dense"])
def test_nothing_unwritten_gets_out(poisoned_memory, backend):
    assert torch.empty(1).isnan()
    for seed in range(20):
        cut = 3 + seed % 7
        mask = MixedMask.build([0, cut, 14], [(1, cut), (cut, 13)], length=18 + seed % 3)
        tensors = draw(mask.length, 4, 2, seed=seed)
        out = run_flip(tensors, mask, backend=backend)
        out.sum().backward()
        for x in (out, *(tensor.grad for tensor in tensors)):
            assert x.isfinite().all() and (x[14:] == 0).all()
        held = torch.cat([torch.arange(2, 6), torch.arange(9, mask.length)])
        query, key, value = draw(mask.length, 4, 2, seed=seed)
        rows = run_flip(
            (query[held], key, value), mask, [(2, 6), (9, mask.length)], backend=backend
        )
        torch.testing.assert_close(rows[:9], out[held][:9], rtol=0, atol=1e-12)
        rows.sum().backward()
        assert all(x.isfinite().all() for x in (rows, query.grad, key.grad, value.grad))


def test_gradients_of_padding_do_not_get_in():
    mask = MixedMask.build([0, 5], [(1, 4)], length=8)
    clean, poisoned = draw(8, 2, 2), draw(8, 2, 2)
    grad = torch.ones(8, 2, 8, dtype=torch.float64)
    run_flip(clean, mask).backward(grad)
    grad[5:] = torch.nan
    run_flip(poisoned, mask).backward(grad)
    for tensor, other in zip(poisoned, clean, strict=True):
        assert torch.equal(tensor.grad, other.grad)


def test_kernels_get_contiguous_gradients(monkeypatch):
    strides = []
    backward = EMULATED.backward
    monkeypatch.setattr(
        EMULATED, "backward", lambda *x: strides.append(x[0].is_contiguous()) or backward(*x)
    )
    out = run_flip(draw(8, 2, 2), MixedMask.build([0, 8], [(1, 4)]))
    out.backward(torch.ones(8, 8, 2, dtype=torch.float64).mT)
    assert strides == [True, True]


def test_a_rank_that_holds_only_padding_has_zeros():
    mask = MixedMask.build([0, 4], [(0, 3)], length=8)
    query, key, value = draw(8, 2, 2)
    out = run_flip((query[4:], key, value), mask, chunks=[(4, 6), (6, 8)])
    out.sum().backward()
    for x in (out, query.grad, key.grad, value.grad):
        assert (x == 0).all()


def test_bottom_right_of_the_emulated_kernels():
    """Two queries, four keys: the first query sees three of them."""
    call = CausalCall(
        queries=None,
        keys=None,
        cu_queries=torch.tensor([0, 2], dtype=torch.int32),
        cu_keys=torch.tensor([0, 4], dtype=torch.int32),
        num_queries=2,
        num_keys=4,
        keys_are_distinct=True,
        max_queries=2,
        max_keys=4,
    )
    query, key, value = (x.detach() for x in draw(4, 2, 2))
    out, lse = EMULATED.forward(FlashInputs(QKV(query[:2], key, value), call, 1.0))
    visible = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    expected = attend_formula(query[:2], key, value, visible, softmax_scale=1.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    scores = torch.einsum("qhd,khd->hqk", query[:2], key).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-13)


def test_without_spans_one_call_is_made(monkeypatch):
    calls = []
    forward = EMULATED.forward
    monkeypatch.setattr(EMULATED, "forward", lambda *x: calls.append(x) or forward(*x))
    run_flip(draw(7, 1, 1), MixedMask.build([0, 3, 7], [(3, 4)]))
    assert len(calls) == 1
    run_flip(draw(7, 1, 1), MixedMask.build([0, 3, 7], [(3, 5)]))
    assert len(calls) == 3


def test_bf16_is_nearly_as_good_as_a_causal_flash_of_its_own():
    """The merge rounds once more: 1.3 times the error of one plain call is allowed."""
    spans = [(35, 227), (300, 492)]
    mask, causal = MixedMask.build([0, 512], spans), MixedMask.build([0, 512])
    errors = []
    for each in (mask, causal):
        tensors = draw(512, 4, 2, 64, dtype=torch.bfloat16)
        rounded = [x.double() for x in tensors]
        exact = attend_formula(*rounded, each.visible(), softmax_scale=0.125)
        ours = attend(*tensors, each, softmax_scale=0.125, backend="flip")
        errors.append((ours.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert errors[0] <= 1.3 * errors[1]


@given(rows, heads)
@settings(max_examples=6, deadline=None)
def test_flex_computes_the_formula(row, heads):
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    tensors = draw(length, *heads, dtype=torch.float64, dim=16)
    with torch.no_grad():
        out = attend(*tensors, mask, softmax_scale=0.3, backend="flex")
        expected = attend_formula(*tensors, mask.visible(), softmax_scale=0.3)
    torch.testing.assert_close(out[: cu[-1]], expected[: cu[-1]], rtol=0, atol=1e-12)
    assert (out[cu[-1] :] == 0).all()


def test_flex_of_some_rows():
    """Two sets of rows of one mask: the block mask of the first is not taken for the second's."""
    mask = MixedMask.build([0, 150, 300], [(20, 140), (200, 290)], length=320)
    query, key, value = (x.detach() for x in draw(320, 2, 1, dim=16))
    expected = attend_formula(query, key, value, mask.visible(), softmax_scale=0.3)
    expected[300:] = 0
    for chunks in ([(80, 160), (240, 320)], [(0, 80), (160, 240)]):
        held = torch.cat([torch.arange(*chunk) for chunk in chunks])
        tensors = (query[held], key, value)
        out = attend(*tensors, mask, softmax_scale=0.3, backend="flex", chunks=chunks)
        torch.testing.assert_close(out, expected[held], rtol=0, atol=1e-12)


def test_block_lists_are_those_of_the_dense_mask():
    mask = MixedMask.build([0, 700, 1500, 2000], [(30, 600), (740, 760), (900, 1400)], length=2048)
    block_mask = build_block_mask(*mask.intervals(), 2048)
    blocks = mask.visible().view(16, 128, 16, 128)
    some, every = blocks.any(3).any(1), blocks.all(3).all(1)
    lists = (block_mask.kv_num_blocks, block_mask.kv_indices)
    full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    for (counts, indices), expected in ((lists, some & ~every), (full, every)):
        for row in range(16):
            chosen = indices[0, 0, row, : counts[0, 0, row]].tolist()
            assert chosen == expected[row].nonzero().flatten().tolist()
    assert every.any() and (some & ~every).any() and not some.all()


def test_the_merge_is_a_softmax_over_both_key_sets():
    """Scores far apart and close together: neither overflows, and the larger one wins."""
    for gap in (-200.0, -1.0, 0.0, 1.0, 200.0):
        out, more = torch.zeros(2, 1, 3).double(), torch.ones(1, 1, 3).double()
        lse, more_lse = torch.zeros(1, 2).double(), torch.full((1, 1), gap).double()
        TORCH_POSITION_OPS.merge(
            FlashOutput(out, lse), FlashOutput(more, more_lse), torch.tensor([1])
        )
        assert (out[0] == 0).all() and lse[0, 0] == 0
        share = 1 / (1 + math.exp(-gap))
        assert out[1].tolist() == [[pytest.approx(share, rel=1e-12)] * 3]
        assert lse[0, 1].item() == pytest.approx(max(gap, 0) + math.log1p(math.exp(-abs(gap))))


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_key_that_two_pieces_read_is_known(cut):
    """Gradients of shared keys must be added up, also where the pieces share a single key."""
    plan = plan_flip([0, 8], [(1, 6)], [(0, cut), (cut, 8)])
    assert plan.flipped is not None and plan.causal is not None
    for call in (plan.flipped, plan.causal):
        assert call.keys is not None
        assert call.keys_are_distinct == (call.keys.unique().numel() == call.keys.numel())
    assert plan.flipped.keys_are_distinct == (cut in (1, 5, 6, 7))  # else the cut is in the span
