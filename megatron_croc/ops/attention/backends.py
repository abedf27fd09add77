"""The one file that decides which attention kernel runs.

| name  | what it is                                            | runs on                        |
|-------|-------------------------------------------------------|--------------------------------|
| flip  | two causal flash calls (flip.py; flash.py, rows.py)   | CUDA float16, bfloat16; CPU    |
| flex  | FlexAttention from block lists (flex.py)              | CUDA; CPU without gradients    |
| dense | scaled-dot-product attention with a dense mask        | everywhere, quadratic memory   |
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_croc.errors import ConfigError
from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.attention import dense, flex
from megatron_croc.ops.attention.flash import choose_flash, flash_unsupported_reasons
from megatron_croc.ops.attention.flip import attend_flip
from megatron_croc.ops.mixed_mask import MixedMask

Chunks = Sequence[tuple[int, int]]

_logger = get_logger(__name__)


@dataclass(frozen=True)
class _Backend:
    attend: Callable[..., Tensor]
    """query, key, value, mask, chunks (None: the whole row), softmax_scale -> out; see `attend`."""

    unsupported_reason: Callable[[Tensor], str | None]
    """Why it cannot run on tensors like this query; None when it can."""


def choose_backend(name: str, query: Tensor) -> str:
    """Resolve `auto` to the fastest backend that runs on `query`.

    Args:
        name: auto, or a name of the table above.
        query: [R, H, d]; its device, dtype and head dim decide. A backend that `auto` passes over
            is named in the log, once.

    Raises:
        ConfigError: the name is unknown, or the backend it forces does not run on such tensors.
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
    for name in _PREFERENCE["cuda" if query.is_cuda else "cpu"]:
        reason = _BACKENDS[name].unsupported_reason(query)
        if reason is None:
            if query.is_cuda:
                log_once(_logger, logging.INFO, "attention backend: %s", name)
            return name
        log_once(_logger, logging.INFO, "attention backend %s is not used: %s", name, reason)
    raise AssertionError("dense runs everywhere")


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
    """Attention over one packed row under a mixed mask.

    Args:
        query: [R, H, d], any floating dtype; all rows (R = T) unless `chunks` says which.
        key: [T, G, d]; G divides H (grouped-query attention).
        value: [T, G, d].
        mask: a mask of the same length T, on the same device.
        softmax_scale: factor of the scores, usually d ** -0.5.
        backend: auto, or a name that `choose_backend` knows.
        chunks: ascending intervals of the row whose rows the query holds, one after the other.

    Returns:
        [R, H, d]; rows past cu_seqlens[-1] hold no meaning, but are finite.

    Raises:
        ConfigError: see `choose_backend`.
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    _check(query, key, value, mask, chunks)
    name = choose_backend(backend, query)
    return _BACKENDS[name].attend(query, key, value, mask, chunks, softmax_scale=softmax_scale)


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: MixedMask, chunks: Chunks | None
) -> None:
    shapes = f"query {[*query.shape]}, key {[*key.shape]}, value {[*value.shape]}"
    rows = mask.length if chunks is None else sum(end - begin for begin, end in chunks)
    if query.dim() != 3 or key.shape != value.shape or key.dim() != 3:
        raise ValueError(f"attention takes [T, heads, head dim] tensors, got {shapes}")
    if query.shape[0] != rows or key.shape[0] != mask.length:
        raise ValueError(f"the mask is of {mask.length} rows, {rows} of them queries; got {shapes}")
    if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(f"key heads must divide query heads, and head dims be equal; got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device == mask.device:
        raise ValueError(f"query is on {query.device}, key on {key.device}, mask on {mask.device}")


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    chunks: Chunks | None,
    *,
    softmax_scale: float,
) -> Tensor:
    if chunks is None:
        return dense.attend_dense(query, key, value, mask, softmax_scale=softmax_scale)
    rows = _rows(tuple(chunks), mask.device)
    return dense.attend_rows(query, key, value, mask, rows, softmax_scale=softmax_scale)


def _flip(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    chunks: Chunks | None,
    *,
    softmax_scale: float,
) -> Tensor:
    plan = mask.flip if chunks is None else mask.flip_of(chunks)
    flash = choose_flash(query)
    assert flash is not None
    log_once(_logger, logging.INFO, "attention backend flip stands on %s", flash.name)
    return attend_flip(query, key, value, plan, softmax_scale=softmax_scale, flash=flash)


def _flip_unsupported_reason(query: Tensor) -> str | None:
    return None if choose_flash(query) is not None else flash_unsupported_reasons(query)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    chunks: Chunks | None,
    *,
    softmax_scale: float,
) -> Tensor:
    rows = None if chunks is None else _rows(tuple(chunks), mask.device)
    return flex.attend_flex(query, key, value, mask, rows, softmax_scale=softmax_scale)


def _flex_unsupported_reason(query: Tensor) -> str | None:
    if not query.is_cuda and query.requires_grad and torch.is_grad_enabled():
        return f"the tensors are on {query.device} and FlexAttention's backward needs CUDA"
    if query.is_cuda and query.shape[-1] < flex.MIN_HEAD_DIM:
        return f"head dim {query.shape[-1]}, FlexAttention takes {flex.MIN_HEAD_DIM} or more"
    return None


@functools.lru_cache(maxsize=16)
def _rows(chunks: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int64, the positions of the chunks' rows."""
    return torch.cat([torch.arange(begin, end, device=device) for begin, end in chunks])


_BACKENDS = {
    "dense": _Backend(_dense, lambda _: None),
    "flip": _Backend(_flip, _flip_unsupported_reason),
    "flex": _Backend(_flex, _flex_unsupported_reason),
}

_PREFERENCE = {"cuda": ("flip", "flex", "dense"), "cpu": ("dense",)}
"""What `auto` tries, in this order. On a CPU dense is faster than the emulated flash."""
