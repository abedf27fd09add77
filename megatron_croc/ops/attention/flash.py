"""The flash attention kernels the flip can stand on: one forward, one backward, causal, varlen.

Only low-level functions are used. The public ones come with a backward of their own, in which the
log-sum-exp is a by-product; the flip needs one that takes the (out, lse) it is given.

| kernels      | functions                                        | arguments as in              |
|--------------|--------------------------------------------------|------------------------------|
| flash-attn 3 | [flash_attn_3.]flash_attn_interface._flash_attn_* | flash-attn tag 2.8.3 and main |
| flash-attn 2 | flash_attn.flash_attn_interface._..._varlen_*    | flash-attn 2.7.0 to 2.8.3    |
| torch flash  | torch.ops.aten._flash_attention_*                | torch 2.13                   |

`choose_flash` takes the first that runs on the tensor at hand. On a CPU it is emulated_flash.py,
plain attention under the same contract. None of the three has been run on a GPU so far; `pytest -m
gpu tests/unit/ops` does that.
"""

import functools
import importlib
import logging
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_croc.libraries import KNOWN, name_unknown_version
from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.attention.contract import QKV, Flash
from megatron_croc.ops.attention.emulated_flash import EMULATED
from megatron_croc.ops.flip_plan import CausalCall

MAX_HEAD_DIM = 256
"""Widest head of every flash kernel here; widths are multiples of 8."""


def choose_flash(query: Tensor) -> Flash | None:
    """The fastest kernels for tensors like `query`; None when there are none.

    On CUDA those passed over are named in the log, once, with the reason.
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
    """Why each of the kernels cannot run on tensors like `query`, in one line."""
    faults = {flash.name: flash.unsupported_reason(query) for flash in _KERNELS}
    return "; ".join(f"{name}: {reason}" for name, reason in faults.items() if reason)


class FlashAttention3:
    """flash-attn 3 (the `hopper` folder of Dao-AILab/flash-attention), interface of 2025.

    Arguments go by position: their names and defaults differ between its versions, the order not.
    """

    name = "flash-attn 3"
    distribution = "flash-attn-3"

    def unsupported_reason(self, query: Tensor) -> str | None:
        """Why it cannot run on tensors like `query`."""
        reason = _kernel_unsupported_reason(query) or _missing(self.distribution)
        if reason is None and _capability(query.device)[0] != 9:
            return f"compute capability {_capability(query.device)}, it needs 9 (Hopper)"
        return reason

    def forward(self, inputs: QKV, call: CausalCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """See `Flash`."""
        out, lse, *_ = _kernels(self.distribution)._flash_attn_forward(
            *inputs,
            *(None,) * 4,  # new keys and values, qv, out
            *(call.cu_queries, call.cu_keys),
            *(None,) * 3,  # cu_seqlens of new keys, used lengths
            *_max_lengths(call),
            *(None,) * 9,  # paging, rotary, scales of float8
            softmax_scale,
            True,  # causal
        )
        return _checked(out, lse, inputs.query)

    def backward(
        self,
        grad: Tensor,
        inputs: QKV,
        out: Tensor,
        lse: Tensor,
        call: CausalCall,
        softmax_scale: float,
    ) -> QKV:
        """See `Flash`."""
        grads = _unwritten(inputs)
        _kernels(self.distribution)._flash_attn_backward(
            *(grad, *inputs, out, lse),
            *(call.cu_queries, call.cu_keys),
            *(None, None),  # used lengths
            *_max_lengths(call),
            *grads,
            softmax_scale,
            True,  # causal
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


class FlashAttention2:
    """The flash-attn package, 2.7 or later."""

    name = "flash-attn 2"
    distribution = "flash-attn"

    def unsupported_reason(self, query: Tensor) -> str | None:
        """Why it cannot run on tensors like `query`."""
        return (
            _kernel_unsupported_reason(query)
            or _missing(self.distribution)
            or _too_old(self.distribution)
        )

    def forward(self, inputs: QKV, call: CausalCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """See `Flash`."""
        kernels = _kernels(self.distribution)
        out, lse, *_ = kernels._flash_attn_varlen_forward(
            *inputs, **self._common(call, softmax_scale)
        )
        return _checked(out, lse, inputs.query)

    def backward(
        self,
        grad: Tensor,
        inputs: QKV,
        out: Tensor,
        lse: Tensor,
        call: CausalCall,
        softmax_scale: float,
    ) -> QKV:
        """See `Flash`."""
        kernels = _kernels(self.distribution)
        grads = _unwritten(inputs)
        kernels._flash_attn_varlen_backward(
            *(grad, *inputs, out, lse, *grads),
            **self._common(call, softmax_scale),
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    @staticmethod
    def _common(call: CausalCall, softmax_scale: float) -> dict[str, Any]:
        max_queries, max_keys = _max_lengths(call)
        return {
            "cu_seqlens_q": call.cu_queries,
            "cu_seqlens_k": call.cu_keys,
            "max_seqlen_q": max_queries,
            "max_seqlen_k": max_keys,
            "dropout_p": 0.0,
            "softmax_scale": softmax_scale,
            "causal": True,
        }


class TorchFlash:
    """The flash kernels inside torch (aten)."""

    name = "torch flash"
    distribution = None

    def unsupported_reason(self, query: Tensor) -> str | None:
        """Why it cannot run on tensors like `query`."""
        reason = _kernel_unsupported_reason(query)
        if reason is None and _capability(query.device) < (8, 0):
            return f"compute capability {_capability(query.device)}, it needs 8.0 or higher"
        return reason

    def forward(self, inputs: QKV, call: CausalCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """See `Flash`."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(*inputs, *self._pieces(call)),
            *(0.0, True),  # dropout, causal
            False,  # no debug mask
            scale=softmax_scale,
        )
        return _checked(out, lse, inputs.query)

    def backward(
        self,
        grad: Tensor,
        inputs: QKV,
        out: Tensor,
        lse: Tensor,
        call: CausalCall,
        softmax_scale: float,
    ) -> QKV:
        """See `Flash`."""
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad.device)
        grads = torch.ops.aten._flash_attention_backward(
            *(grad, *inputs, out, lse, *self._pieces(call)),
            *(0.0, True),  # dropout, causal
            *(no_dropout, no_dropout),  # random state
            scale=softmax_scale,
        )
        return QKV(*grads)

    @staticmethod
    def _pieces(call: CausalCall) -> tuple[Tensor, Tensor, int, int]:
        return call.cu_queries, call.cu_keys, *_max_lengths(call)


def _kernel_unsupported_reason(query: Tensor) -> str | None:
    """What rules out every CUDA kernel."""
    if not query.is_cuda:
        return f"the tensors are on {query.device}, it needs CUDA"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"{query.dtype} tensors, it takes float16 and bfloat16"
    head_dim = query.shape[-1]
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim}, it takes multiples of 8 up to {MAX_HEAD_DIM}"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.get_device_module(device).get_device_capability(device)


def _missing(distribution: str) -> str | None:
    """Why `distribution` cannot be imported; None when it can."""
    found = _import(distribution)
    return found if isinstance(found, str) else None


@functools.cache
def _import(distribution: str) -> ModuleType | str:
    """The first module of `distribution` that imports, or why none does."""
    reasons: list[str] = []
    for module in KNOWN[distribution].modules:
        try:
            return importlib.import_module(module)
        except (ImportError, OSError) as error:
            reasons.append(f"{module} cannot be imported ({error})")
    return ", ".join(reasons)


def _kernels(distribution: str) -> Any:
    """The module of the kernels, after `unsupported_reason` has said that it is there."""
    found = _import(distribution)
    assert isinstance(found, ModuleType), found
    return found


@functools.cache
def _too_old(distribution: str) -> str | None:
    """Why the installed version of `distribution` has another interface; None when it has not."""
    least = KNOWN[distribution].first
    try:
        found = version(distribution)
    except PackageNotFoundError as error:
        return f"its version is not known ({error})"
    if tuple(int(part) for part in found.split(".")[:2]) < least:
        return f"{distribution} {found} is too old, it takes {'.'.join(map(str, least))}"
    return None


def _checked(out: Tensor, lse: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels and their versions differ in the layout of lse; only [H, n] is understood here."""
    expected = (query.shape[1], query.shape[0])
    assert lse.shape == expected, f"lse is {[*lse.shape]}, not [H, n] = {[*expected]}"
    assert lse.dtype == torch.float32, f"lse is {lse.dtype}"
    return out, lse


def _max_lengths(call: CausalCall) -> tuple[int, int]:
    # A maximum of 1 sends flash-attn 2 down its decoding path (flash-attention#1537).
    return max(call.max_queries, 2), max(call.max_keys, 2)


def _unwritten(inputs: QKV) -> QKV:
    """Contiguous memory for the gradients of `inputs`."""
    return QKV(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs))


_KERNELS: tuple[Flash, ...] = (FlashAttention3(), FlashAttention2(), TorchFlash())
