"""Flash attention kernels for the flip: one forward and one backward each, causal, varlen.

The low-level functions are called, because the flip passes its own (out, lse) to the backward. The
public functions have an autograd backward of their own, with the (out, lse) of their one call.

| kernels      | functions                                        | arguments as in              |
|--------------|--------------------------------------------------|------------------------------|
| flash-attn 3 | [flash_attn_3.]flash_attn_interface._flash_attn_* | flash-attn tag 2.8.3 and main |
| flash-attn 2 | flash_attn.flash_attn_interface._..._varlen_*    | flash-attn 2.7.0 to 2.8.3    |
| torch flash  | torch.ops.aten._flash_attention_*                | torch 2.13                   |

`choose_flash` returns the first that runs on a tensor; on a CPU the plain attention of
emulated_flash.py. None of the three has been run on a GPU so far; `pytest -m gpu tests/unit/ops`
does that.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from megatron_croc.libraries import name_unknown_version
from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.attention.contract import QKV, Flash, FlashInputs, FlashOutput
from megatron_croc.ops.attention.emulated_flash import EMULATED
from megatron_croc.ops.attention.packages import (
    capability,
    kernels_of,
    missing,
    refused_by_cuda_kernels,
    too_old,
)
from megatron_croc.ops.flip_plan import CausalCall

MAX_HEAD_DIM = 256
"""Largest head dim of all these kernels; head dims are multiples of 8."""


def choose_flash(query: Tensor) -> Flash | None:
    """Return the fastest kernels for tensors like `query`; None if there are none.

    On CUDA the log names, once, the faster kernels that cannot be used, with the reason.
    """
    for flash in (*_KERNELS, EMULATED):
        reason = flash.unsupported_reason(query)
        if reason is None:
            if flash.distribution is not None:
                name_unknown_version(flash.distribution)
            return flash
        if query.is_cuda:
            log_once(get_logger(__name__), logging.INFO, "%s is not used: %s", flash.name, reason)
    return None


def flash_unsupported_reasons(query: Tensor) -> str:
    """Reasons against each of the kernels for tensors like `query`, in one line."""
    faults = {flash.name: flash.unsupported_reason(query) for flash in _KERNELS}
    return "; ".join(f"{name}: {reason}" for name, reason in faults.items() if reason)


class FlashAttention3:
    """flash-attn 3 (the `hopper` folder of Dao-AILab/flash-attention), interface of 2025.

    Arguments are positional: names and defaults differ between its versions, the order does not.
    """

    name = "flash-attn 3"
    distribution = "flash-attn-3"

    def unsupported_reason(self, query: Tensor) -> str | None:
        """See `Flash`."""
        reason = refused_by_cuda_kernels(query, MAX_HEAD_DIM) or missing(self.distribution)
        if reason is None and capability(query.device)[0] != 9:
            return f"compute capability {capability(query.device)}, 9 (Hopper) is needed"
        return reason

    def forward(self, inputs: FlashInputs) -> FlashOutput:
        """See `Flash`."""
        call = inputs.call
        out, lse, *_ = kernels_of(self.distribution)._flash_attn_forward(
            *inputs.tensors,
            *(None,) * 4,  # new keys and values, qv, out
            *(call.cu_queries, call.cu_keys),
            *(None,) * 3,  # cu_seqlens of new keys, used lengths
            *_max_lengths(call),
            *(None,) * 9,  # paging, rotary, scales of float8
            inputs.softmax_scale,
            True,  # causal
        )
        return _check_output(out, lse, inputs)

    def backward(self, grad: Tensor, inputs: FlashInputs, output: FlashOutput) -> QKV:
        """See `Flash`."""
        call, grads = inputs.call, _allocate(inputs.tensors)
        kernels_of(self.distribution)._flash_attn_backward(
            *(grad, *inputs.tensors, *output),
            *(call.cu_queries, call.cu_keys),
            *(None, None),  # used lengths
            *_max_lengths(call),
            *grads,
            inputs.softmax_scale,
            True,  # causal
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


class FlashAttention2:
    """The flash-attn package, 2.7 or later."""

    name = "flash-attn 2"
    distribution = "flash-attn"

    def unsupported_reason(self, query: Tensor) -> str | None:
        """See `Flash`."""
        return (
            refused_by_cuda_kernels(query, MAX_HEAD_DIM)
            or missing(self.distribution)
            or too_old(self.distribution)
        )

    def forward(self, inputs: FlashInputs) -> FlashOutput:
        """See `Flash`."""
        kernels = kernels_of(self.distribution)
        out, lse, *_ = kernels._flash_attn_varlen_forward(*inputs.tensors, **self._common(inputs))
        return _check_output(out, lse, inputs)

    def backward(self, grad: Tensor, inputs: FlashInputs, output: FlashOutput) -> QKV:
        """See `Flash`."""
        kernels = kernels_of(self.distribution)
        grads = _allocate(inputs.tensors)
        kernels._flash_attn_varlen_backward(
            *(grad, *inputs.tensors, *output, *grads),
            **self._common(inputs),
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    @staticmethod
    def _common(inputs: FlashInputs) -> dict[str, Any]:
        """Arguments of both passes."""
        max_queries, max_keys = _max_lengths(inputs.call)
        return {
            "cu_seqlens_q": inputs.call.cu_queries,
            "cu_seqlens_k": inputs.call.cu_keys,
            "max_seqlen_q": max_queries,
            "max_seqlen_k": max_keys,
            "dropout_p": 0.0,
            "softmax_scale": inputs.softmax_scale,
            "causal": True,
        }


class TorchFlash:
    """Flash attention kernels of torch (aten)."""

    name = "torch flash"
    distribution = None

    def unsupported_reason(self, query: Tensor) -> str | None:
        """See `Flash`."""
        reason = refused_by_cuda_kernels(query, MAX_HEAD_DIM)
        if reason is None and capability(query.device) < (8, 0):
            return f"compute capability {capability(query.device)}, 8.0 or higher is needed"
        return reason

    def forward(self, inputs: FlashInputs) -> FlashOutput:
        """See `Flash`."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(*inputs.tensors, *self._pieces(inputs.call)),
            *(0.0, True),  # dropout, causal
            False,  # no debug mask
            scale=inputs.softmax_scale,
        )
        return _check_output(out, lse, inputs)

    def backward(self, grad: Tensor, inputs: FlashInputs, output: FlashOutput) -> QKV:
        """See `Flash`."""
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad.device)
        grads = torch.ops.aten._flash_attention_backward(
            *(grad, *inputs.tensors, *output, *self._pieces(inputs.call)),
            *(0.0, True),  # dropout, causal
            *(no_dropout, no_dropout),  # random state
            scale=inputs.softmax_scale,
        )
        return QKV(*grads)

    @staticmethod
    def _pieces(call: CausalCall) -> tuple[Tensor, Tensor, int, int]:
        return call.cu_queries, call.cu_keys, *_max_lengths(call)


def _check_output(out: Tensor, lse: Tensor, inputs: FlashInputs) -> FlashOutput:
    """Refuse another layout of lse than float32 [H, n]; kernels and their versions differ in it."""
    query = inputs.tensors.query
    expected = (query.shape[1], query.shape[0])
    assert lse.shape == expected, f"lse is {[*lse.shape]}, not [H, n] = {[*expected]}"
    assert lse.dtype == torch.float32, f"lse is {lse.dtype}"
    return FlashOutput(out, lse)


def _max_lengths(call: CausalCall) -> tuple[int, int]:
    # With a maximum of 1 flash-attn 2 uses its decoding path (flash-attention#1537).
    return max(call.max_queries, 2), max(call.max_keys, 2)


def _allocate(tensors: QKV) -> QKV:
    """Contiguous uninitialised memory for the gradients of `tensors`."""
    return QKV(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors))


_KERNELS: tuple[Flash, ...] = (FlashAttention3(), FlashAttention2(), TorchFlash())
