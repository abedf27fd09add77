"""Attention against softmax over exactly the visible keys, written as loops in float64."""

import math
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from megatron_croc.config.model import AttentionBackend
from megatron_croc.errors import ConfigError
from megatron_croc.ops.attention import attend
from megatron_croc.ops.attention.backends import _BACKENDS, _PREFERENCE, choose_backend
from megatron_croc.ops.attention.dense import attend_formula, attend_full
from megatron_croc.ops.attention.emulated_flash import EMULATED, EmulatedFlash
from megatron_croc.ops.attention.flash import (
    FlashAttention2,
    FlashAttention3,
    TorchFlash,
    choose_flash,
    flash_unsupported_reasons,
)
from megatron_croc.ops.mixed_mask import MixedMask

MASKS = {
    "causal": MixedMask.build([0, 13]),
    "packed": MixedMask.build([0, 5, 6, 13]),
    "prefix": MixedMask.build([0, 8, 13], [(0, 3), (8, 11)]),
    "images": MixedMask.build([0, 9, 13], [(1, 4), (4, 7), (7, 8), (9, 13)]),
    "padded": MixedMask.build([0, 4, 9], [(1, 3), (6, 9)], length=13),
}


def draw(num_heads, num_groups, dtype=torch.float64, length=13, dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (num_heads, num_groups, num_groups)
    return [
        torch.randn(length, heads, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads in shapes
    ]


def loops(query, key, value, visible, scale):
    """One query and one head at a time."""
    repeats = query.shape[1] // key.shape[1]
    rows = []
    for t in range(query.shape[0]):
        seen = visible[t].nonzero().flatten().tolist()
        heads = []
        for head in range(query.shape[1]):
            group = head // repeats
            scores = torch.stack([query[t, head] @ key[s, group] * scale for s in seen])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(w * value[s, group] for w, s in zip(weights, seen, strict=True)))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def real_rows(mask):
    return int(mask.cu_seqlens[-1])


@pytest.mark.parametrize("num_groups", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_the_formula_is_the_definition(name, num_groups):
    tensors = draw(4, num_groups)
    visible = MASKS[name].visible()
    with torch.no_grad():
        ours = attend_formula(*tensors, visible, softmax_scale=0.3)
        torch.testing.assert_close(ours, loops(*tensors, visible, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "dense", "flip"])
@pytest.mark.parametrize("num_groups", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_the_formulas(name, num_groups, backend):
    mask = MASKS[name]
    n = real_rows(mask)
    ours, reference = draw(4, num_groups), draw(4, num_groups)
    out = attend(*ours, mask, softmax_scale=0.3, backend=backend)
    expected = attend_formula(*reference, mask.visible(), softmax_scale=0.3)
    assert out.isfinite().all()
    # float64: only the order of sums differs.
    torch.testing.assert_close(out[:n], expected[:n], rtol=1e-12, atol=1e-13)
    weight = torch.randn(out[:n].shape, generator=torch.Generator().manual_seed(1)).double()
    (out[:n] * weight).sum().backward()
    (expected[:n] * weight).sum().backward()
    for tensor, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-11, atol=1e-13)
        assert (tensor.grad[n:] == 0).all()


@pytest.mark.parametrize("backend", ["dense", "flip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_formula_in_it(dtype, backend):
    mask = MASKS["images"]
    exact = attend_formula(*draw(4, 2), mask.visible(), softmax_scale=0.3)
    tensors = draw(4, 2, dtype)
    ours = attend(*tensors, mask, softmax_scale=0.3, backend=backend)
    assert ours.dtype == dtype
    plain = attend_formula(*tensors, mask.visible(), softmax_scale=0.3)
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, plain))
    # No worse than twice the readable formula in the same dtype (and one rounding of it).
    assert error <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["dense", "flip"])
def test_what_a_row_depends_on_is_what_it_sees(backend):
    """The pattern of the Jacobian is the mask: nothing leaks, nothing is missing."""
    mask = MASKS["padded"]
    n = real_rows(mask)
    query, key, value = draw(1, 1)
    out = attend(query, key, value, mask, softmax_scale=0.3, backend=backend)
    for tensor in (key, value):
        touched = torch.zeros(n, 13, dtype=torch.bool)
        for t in range(n):
            (grad,) = torch.autograd.grad(out[t].square().sum(), tensor, retain_graph=True)
            touched[t] = grad.abs().amax(dim=(1, 2)) > 1e-12  # below: rounding of a zero
        visible = mask.visible()[:n].clone()
        if tensor is key:  # a softmax over one key has no gradient
            visible[visible.sum(dim=1) == 1] = False
        assert torch.equal(touched, visible)


def test_a_mask_is_not_mistaken_for_the_one_before():
    tensors = draw(2, 2)
    for name in ("causal", "prefix", "causal", "images", "prefix"):
        mask = MASKS[name]
        with torch.no_grad():
            ours = attend(*tensors, mask, softmax_scale=1.0)
            expected = attend_formula(*tensors, mask.visible(), softmax_scale=1.0)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_full_attention_sees_everything_of_its_own_row():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 3, 2, 4, generator=generator).double() for _ in range(3))
    ours = attend_full(q, k, v, softmax_scale=0.5)
    for b in range(3):
        scores = torch.einsum("qhd,khd->hqk", q[:, b], k[:, b]) * 0.5
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[:, b])
        torch.testing.assert_close(ours[:, b], expected, rtol=1e-12, atol=1e-13)


def test_the_scale_is_the_one_given():
    query, key, value = draw(1, 1, length=2)
    mask = MixedMask.build([0, 2])
    out = attend(query, key, value, mask, softmax_scale=2.0)
    first, second = ((query[1, 0] @ key[s, 0]).item() * 2.0 for s in (0, 1))
    share = math.exp(first) / (math.exp(first) + math.exp(second))
    expected = share * value[0, 0] + (1 - share) * value[1, 0]
    torch.testing.assert_close(out[1, 0], expected, rtol=1e-12, atol=1e-13)


def test_an_unknown_backend_is_refused_by_name():
    query = draw(1, 1)[0]
    with pytest.raises(ConfigError, match=r"--attention-backend fast .*dense"):
        choose_backend("fast", query)
    assert choose_backend("dense", query) == "dense"
    assert choose_backend("auto", query) == "dense"  # the fastest on a CPU


def test_every_backend_of_the_setting_exists():
    names = set(get_args(AttentionBackend)) - {"auto"}
    assert names == set(_BACKENDS) == set(_PREFERENCE["cuda"])


def test_a_forced_backend_that_cannot_run_says_why():
    tensors = draw(1, 1)
    with pytest.raises(ConfigError, match=r"flex cannot run here: .* on cpu .*backward"):
        attend(*tensors, MASKS["causal"], softmax_scale=1.0, backend="flex")


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (FlashAttention3(), "torch.float32 tensors, float16 or bfloat16 is needed"),
        (FlashAttention2(), "head dim 12, a multiple of 8 up to 256 is needed"),
        (TorchFlash(), "head dim 264, a multiple of 8 up to 256 is needed"),
        (EmulatedFlash(), "it is for CPUs"),
    ],
)
def test_kernels_say_what_they_do_not_take(fault, match):
    dim = int(re.search(r"dim (\d+)", match).group(1)) if "dim" in match else 64
    dtype = torch.float32 if "float32" in match else torch.bfloat16
    query = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=dtype, shape=(4, 1, dim))
    assert match in fault.unsupported_reason(query)


def test_on_a_cpu_every_kernel_is_passed_over_for_the_emulated():
    query = draw(1, 1)[0]
    assert choose_flash(query) is EMULATED
    assert flash_unsupported_reasons(query).count("the tensors are on cpu, CUDA is needed") == 3


@pytest.mark.parametrize(
    ("shapes", "values"),
    [
        (([12, 2, 4], [13, 2, 4], [13, 2, 4]), "mask has 13 positions"),
        (([13, 2, 4], [12, 2, 4], [12, 2, 4]), "key [12, 2, 4]"),
        (([13, 3, 4], [13, 2, 4], [13, 2, 4]), "key heads must divide query heads"),
        (([13, 2, 8], [13, 2, 4], [13, 2, 4]), "head dims be equal"),
        (([13, 2, 4], [13, 2, 4], [13, 1, 4]), "value [13, 1, 4]"),
        (([1, 13, 2, 4], [13, 2, 4], [13, 2, 4]), "query [1, 13, 2, 4]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_their_shapes(shapes, values):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError) as error:
        attend(*tensors, MASKS["causal"], softmax_scale=1.0)
    assert values in str(error.value)


def test_mixed_dtypes_are_refused():
    query, key, value = draw(1, 1)
    with pytest.raises(ValueError, match=r"float64, torch\.float32, torch\.float64"):
        attend(query, key.float(), value, MASKS["causal"], softmax_scale=1.0)


def test_a_sample_of_a_dense_pack_costs_no_pass_over_the_pack():
    """The backward pass of a slice fills zeros of the whole pack, for every sample and layer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_croc.ops.attention.dense import attend_dense

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    mask = MixedMask.build([0, 5, 9, 12], [(0, 3)], length=14)
    query, key, value = (torch.randn(14, 2, 8, requires_grad=True) for _ in range(3))
    with Names():
        attend_dense(query, key, value, mask, softmax_scale=0.3).sum().backward()
    assert names.count("aten::slice_backward") <= 1  # the padding
