"""The calls of the flash kernels' low-level functions, against their published signatures.

No kernel runs here: flash-attn's functions are stood in for by ones of the same parameters that
compute on the CPU, and torch's own are called on meta tensors.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_croc.ops.attention import flash as flash_module
from megatron_croc.ops.attention.contract import QKV, FlashInputs, FlashOutput
from megatron_croc.ops.attention.dense import attend_formula
from megatron_croc.ops.attention.emulated_flash import EMULATED
from megatron_croc.ops.attention.flash import (
    FlashAttention2,
    FlashAttention3,
    TorchFlash,
    choose_flash,
)
from megatron_croc.ops.attention.flip import attend_flip
from megatron_croc.ops.attention.packages import _import
from megatron_croc.ops.mixed_mask import MixedMask

MASK = MixedMask.build([0, 1, 20, 31], [(3, 9), (9, 11), (22, 31)], length=36)


def emulate(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    """The call as EMULATED takes it, from what a kernel was given."""
    assert causal is True and cu_q.dtype == cu_k.dtype == torch.int32
    lengths = cu_q.diff().max().item(), cu_k.diff().max().item()
    assert (max_q, max_k) == tuple(max(n, 2) for n in lengths) and all(
        type(n) is int for n in lengths
    )
    return FlashInputs(QKV(q, k, v), SimpleNamespace(cu_queries=cu_q, cu_keys=cu_k), scale)


def emulated_forward(*arguments):
    return EMULATED.forward(emulate(*arguments))


def emulated_backward(dout, out, lse, grads, *arguments):
    computed = EMULATED.backward(dout, emulate(*arguments), FlashOutput(out, lse))
    for target, grad in zip(grads, computed, strict=True):
        target.copy_(grad)


def flash_attn_2():
    """Parameters of flash_attn/flash_attn_interface.py at 2.7.0; later versions add to them."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert dropout_p == 0.0
        out, lse = emulated_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
        )
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
        assert dropout_p == 0.0 and deterministic is False
        emulated_backward(
            dout, out, softmax_lse, (dq, dk, dv), q, k, v, cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        )  # fmt: skip

    return _flash_attn_varlen_forward, _flash_attn_varlen_backward


def flash_attn_3():
    """Parameters of hopper/flash_attn_interface.py at flash-attention's tag 2.8.3."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
        rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        unused = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table)
        unused += (kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary)
        assert {*unused, q_descale, k_descale, v_descale} == {None}
        return emulated_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
        )

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k,
        max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1),
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert sequed_q is None and sequed_k is None and deterministic is False
        emulated_backward(
            dout, out, softmax_lse, (dq, dk, dv), q, k, v, cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        )  # fmt: skip

    return _flash_attn_forward, _flash_attn_backward


@pytest.fixture(autouse=True)
def import_anew():
    _import.cache_clear()
    yield
    _import.cache_clear()


def draw(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(36, n, 16, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    return [x.to(dtype).requires_grad_() for x in drawn]


@pytest.mark.parametrize(
    ("flash", "module", "functions"),
    [
        (FlashAttention2(), "flash_attn.flash_attn_interface", flash_attn_2()),
        (FlashAttention3(), "flash_attn_interface", flash_attn_3()),
        (FlashAttention3(), "flash_attn_3.flash_attn_interface", flash_attn_3()),
    ],
    ids=["2", "3", "3 as Transformer Engine installs it"],
)
def test_flash_attn_is_called_as_it_is_published(monkeypatch, flash, module, functions):
    package = module.partition(".")[0]
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    stand_in = ModuleType(module)
    for function in functions:
        setattr(stand_in, function.__name__, function)
    monkeypatch.setitem(sys.modules, module, stand_in)
    tensors, exact = draw(), draw(torch.float64)
    out = attend_flip(*tensors, MASK.flip, softmax_scale=0.3, flash=flash)
    expected = attend_formula(*exact, MASK.visible(), softmax_scale=0.3)[:31]
    torch.testing.assert_close(out[:31].double(), expected, rtol=0, atol=1e-5)
    grads = torch.autograd.grad(out[:31].square().sum(), tensors)
    truths = torch.autograd.grad(expected.square().sum(), exact)
    for grad, truth in zip(grads, truths, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=0, atol=1e-4)


def test_torchs_own_functions_take_the_call():
    """On meta tensors: torch checks the arguments and says the shapes, lse [H, n] among them."""
    shapes = [(36, n, 64) for n in (4, 2, 2)]
    tensors = QKV(*(torch.empty(s, device="meta", dtype=torch.bfloat16) for s in shapes))
    inputs, flash = FlashInputs(tensors, MASK.to("meta").flip.causal, 0.125), TorchFlash()
    output = flash.forward(inputs)
    assert output.out.shape == tensors.query.shape and output.lse.shape == (4, 36)
    grads = flash.backward(torch.empty_like(output.out), inputs, output)
    assert [x.shape for x in grads] == [x.shape for x in tensors]


def test_the_version_of_the_chosen_kernels_is_looked_at(monkeypatch):
    looked_at = []
    monkeypatch.setattr(flash_module, "name_unknown_version", looked_at.append)
    assert choose_flash(torch.empty(4, 2, 16)) is EMULATED
    assert looked_at == []
    monkeypatch.setattr(FlashAttention2, "unsupported_reason", lambda self, query: None)
    assert choose_flash(torch.empty(4, 2, 16)).name == "flash-attn 2"
    assert looked_at == ["flash-attn"]
