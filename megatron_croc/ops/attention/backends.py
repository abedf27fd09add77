"""Choice of the attention backend, for the whole project.

| name  | implementation                                     | runs on                      |
|-------|----------------------------------------------------|------------------------------|
| flip  | two causal flash calls (flip.py, flash.py)         | CUDA float16, bfloat16; CPU  |
| flex  | FlexAttention with block lists (flex.py)           | CUDA; CPU without gradients  |
| fa4   | FlashAttention 4 with a mask_mod (fa4.py)          | Hopper float16, bfloat16     |
| ffa   | MagiAttention's rectangles (ffa.py)                | Hopper float16, bfloat16     |
| dense | scaled-dot-product attention, dense mask (dense.py)| everywhere, quadratic memory |
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_croc.errors import ConfigError
from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.attention import dense, fa4, ffa, flex, measured
from megatron_croc.ops.attention.flash import choose_flash, flash_unsupported_reasons
from megatron_croc.ops.attention.flip import attend_flip
from megatron_croc.ops.attention.packages import gpu_name
from megatron_croc.ops.mixed_mask import MixedMask

Chunks = Sequence[tuple[int, int]]

_logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Arguments of `attend`, in the form that all backends take."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: MixedMask
    softmax_scale: float
    chunks: tuple[tuple[int, int], ...] | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def positions(self) -> Tensor | None:
        """Positions of the queries, int64 [R]; None: all of the pack."""
        return None if self.chunks is None else _positions(self.chunks, self.mask.device)

    def check(self) -> None:
        """Raise ValueError if shapes, dtypes or devices do not fit together."""
        query, key, value = self.tensors
        length, chunks = self.mask.length, self.chunks
        shapes = f"query {[*query.shape]}, key {[*key.shape]}, value {[*value.shape]}"
        queries = length if chunks is None else sum(end - begin for begin, end in chunks)
        if query.dim() != 3 or key.shape != value.shape or key.dim() != 3:
            raise ValueError(f"attention takes [T, heads, head dim] tensors, got {shapes}")
        if query.shape[0] != queries or key.shape[0] != length:
            raise ValueError(
                f"the mask has {length} positions, {queries} of them queries; got {shapes}"
            )
        if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
            raise ValueError(
                f"key heads must divide query heads, and head dims be equal; got {shapes}"
            )
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError(f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}")
        if not query.device == key.device == value.device == self.mask.device:
            raise ValueError(
                f"query is on {query.device}, key on {key.device}, value on {value.device}, "
                f"mask on {self.mask.device}"
            )


@dataclass(frozen=True)
class _Backend:
    attend: Callable[[_Inputs], Tensor]
    """Attention [R, H, d]."""

    unsupported_reason: Callable[[Tensor], str | None]
    """Reason against this backend for tensors like the query; None if it can be used."""


def choose_backend(name: str, query: Tensor) -> str:
    """Return the name of the backend for tensors like `query`.

    Args:
        name: auto (the fastest of those that can be used, as far as it was measured on this GPU,
            see `measured`; else the first), or a name of the table above.
        query: [R, H, d]; its device, dtype, head dim and, if measured, length matter. The log
            names, once, what `auto` takes and what it cannot use, with the reasons.

    Raises:
        ConfigError: the name is unknown, or this backend does not run on such tensors.
    """
    if name == "auto":
        return _fastest(query)
    if name not in _BACKENDS:
        raise ConfigError(
            f"--attention-backend {name} is not known; choose auto or one of {', '.join(_BACKENDS)}"
        )
    reason = _BACKENDS[name].unsupported_reason(query)
    if reason is not None:
        raise ConfigError(
            f"--attention-backend {name} cannot run here: {reason}. "
            "Use --attention-backend auto, or dense, which runs everywhere"
        )
    return name


def _fastest(query: Tensor) -> str:
    able = []
    for name in _PREFERENCE["cuda" if query.is_cuda else "cpu"]:
        reason = _BACKENDS[name].unsupported_reason(query)
        if reason is None:
            able.append(name)
        elif not able:
            log_once(_logger, logging.INFO, "attention backend %s is not used: %s", name, reason)
    if not query.is_cuda:
        return able[0]
    name, reason = measured.choose(
        tuple(able), gpu_name(query.device), query.shape[-1], query.shape[0]
    )
    log_once(_logger, logging.INFO, "attention backend: %s (%s)", name, reason)
    return name


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    *,
    softmax_scale: float,
    backend: str = "auto",
    chunks: Chunks | None = None,
) -> Tensor:
    """Attention over one pack under a mixed mask.

    Args:
        query: [R, H, d], any floating dtype; all positions (R = T), or those of `chunks`.
        key: [T, G, d]; G divides H (grouped-query attention).
        value: [T, G, d].
        mask: a mask of length T, on the same device.
        softmax_scale: factor of the scores, usually d ** -0.5.
        backend: auto, or a name of the table above.
        chunks: ascending intervals of the pack; the query holds their positions, one chunk after
            the other.

    Returns:
        [R, H, d]; values of padding (from cu_seqlens[-1] on) are finite and have no meaning.

    Raises:
        ConfigError: see `choose_backend`.
        ValueError: shapes, dtypes or devices do not fit together.
    """
    held = None if chunks is None else tuple(chunks)
    inputs = _Inputs(query, key, value, mask, softmax_scale, held)
    inputs.check()
    return _BACKENDS[choose_backend(backend, query)].attend(inputs)


def _dense(inputs: _Inputs) -> Tensor:
    positions, scale = inputs.positions(), inputs.softmax_scale
    if positions is None:
        return dense.attend_dense(*inputs.tensors, inputs.mask, softmax_scale=scale)
    return dense.attend_positions(*inputs.tensors, inputs.mask, positions, softmax_scale=scale)


def _flip(inputs: _Inputs) -> Tensor:
    mask, chunks = inputs.mask, inputs.chunks
    plan = mask.flip if chunks is None else mask.flip_of(chunks)
    flash = choose_flash(inputs.query)
    assert flash is not None
    log_once(_logger, logging.INFO, "attention backend flip uses %s", flash.name)
    return attend_flip(*inputs.tensors, plan, softmax_scale=inputs.softmax_scale, flash=flash)


def _flip_unsupported_reason(query: Tensor) -> str | None:
    return None if choose_flash(query) is not None else flash_unsupported_reasons(query)


def _flex(inputs: _Inputs) -> Tensor:
    return flex.attend_flex(
        *inputs.tensors, inputs.mask, inputs.positions(), softmax_scale=inputs.softmax_scale
    )


def _flex_unsupported_reason(query: Tensor) -> str | None:
    if not query.is_cuda and query.requires_grad and torch.is_grad_enabled():
        return f"the tensors are on {query.device} and FlexAttention's backward needs CUDA"
    if query.is_cuda and query.shape[-1] < flex.MIN_HEAD_DIM:
        return f"head dim {query.shape[-1]}, FlexAttention takes {flex.MIN_HEAD_DIM} or more"
    return None


@functools.lru_cache(maxsize=16)
def _positions(chunks: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Positions of the chunks, int64 [R]."""
    return torch.cat([torch.arange(begin, end, device=device) for begin, end in chunks])


def _fa4(inputs: _Inputs) -> Tensor:
    return fa4.attend_fa4(
        *inputs.tensors, inputs.mask, inputs.positions(), softmax_scale=inputs.softmax_scale
    )


def _ffa(inputs: _Inputs) -> Tensor:
    return ffa.attend_ffa(
        *inputs.tensors, inputs.mask, inputs.chunks, softmax_scale=inputs.softmax_scale
    )


_BACKENDS = {
    "dense": _Backend(_dense, lambda _: None),
    "flip": _Backend(_flip, _flip_unsupported_reason),
    "flex": _Backend(_flex, _flex_unsupported_reason),
    "fa4": _Backend(_fa4, fa4.unsupported_reason),
    "ffa": _Backend(_ffa, ffa.unsupported_reason),
}

_PREFERENCE = {"cuda": ("flip", "flex", "dense", "fa4", "ffa"), "cpu": ("dense",)}
"""Order of `auto` where nothing was measured. On a CPU dense is faster than the emulated flash."""
