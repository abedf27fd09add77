"""What the flip does to rows between its two flash calls: gather, merge, add.

The torch operations below are the meaning; triton_rows.py does each of the four in one launch,
without the intermediate tensors. `choose_rows` takes it where Triton compiles for the device.
"""

import functools
import importlib
import logging
import os
from typing import Protocol

import torch
from torch import Tensor

from megatron_croc.errors import first_line
from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.attention.contract import QKV
from megatron_croc.ops.flip_plan import CausalCall


class Rows(Protocol):
    """The four operations. `call.queries` and `call.keys` of None mean rows in their own order."""

    @property
    def name(self) -> str:
        """What the log calls it."""
        ...

    def gather(self, inputs: QKV, call: CausalCall) -> QKV:
        """The rows the call reads, in the order it reads them."""
        ...

    def merge(self, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, rows: Tensor) -> None:
        """Fold attention to further keys into some rows of (out, lse), in place.

        Args:
            out: [n, H, d].
            lse: [H, n], in the dtype the merge is computed in.
            more: [r, H, d], attention of the rows `rows` (int64 [r]) to keys that out has not seen.
            more_lse: [H, r].
            rows: without repetition.
        """
        ...

    def gather_outputs(
        self, grad: Tensor, out: Tensor, lse: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows `rows` (int64 [r]) of grad [n, H, d], out [n, H, d] and lse [H, n]."""
        ...

    def add(self, totals: QKV, shares: QKV, call: CausalCall) -> None:
        """Add the gradients of what the call read to those of what it was gathered from."""
        ...


class TorchRows:
    """Plain torch operations, on any device."""

    name = "torch operations"

    def gather(self, inputs: QKV, call: CausalCall) -> QKV:
        """See `Rows`."""
        query, key, value = inputs
        if call.queries is not None:
            query = query.index_select(0, call.queries)
        if call.keys is not None:
            key, value = (x.index_select(0, call.keys) for x in (key, value))
        return QKV(query, key, value)

    def merge(self, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, rows: Tensor) -> None:
        """See `Rows`."""
        before, before_lse = out.index_select(0, rows), lse.index_select(1, rows)
        weight = torch.sigmoid(more_lse - before_lse).t().unsqueeze(-1)  # [r, H, 1]
        merged = torch.lerp(before.to(weight.dtype), more.to(weight.dtype), weight)
        out.index_copy_(0, rows, merged.to(out.dtype))
        lse.index_copy_(1, rows, torch.logaddexp(before_lse, more_lse))

    def gather_outputs(
        self, grad: Tensor, out: Tensor, lse: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Rows`."""
        return grad.index_select(0, rows), out.index_select(0, rows), lse.index_select(1, rows)

    def add(self, totals: QKV, shares: QKV, call: CausalCall) -> None:
        """See `Rows`."""
        indices = (call.queries, call.keys, call.keys)
        for total, share, index in zip(totals, shares, indices, strict=True):
            if index is None:
                total[: share.shape[0]] += share
            else:
                total.index_add_(0, index, share)


TORCH_ROWS = TorchRows()


def choose_rows(x: Tensor) -> Rows:
    """Triton's kernels where they run on tensors like `x`, torch operations elsewhere.

    Why Triton is passed over on CUDA is said in the log, once.
    """
    if not x.is_cuda and not _interpreting():
        return TORCH_ROWS
    rows, reason = _triton_rows(x.device)
    if reason is not None:
        log_once(
            get_logger(__name__), logging.INFO, "attention rows: torch operations, for %s", reason
        )
    return rows


def _interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_rows(device: torch.device) -> tuple[Rows, str | None]:
    """Triton's kernels, or torch operations and why."""
    try:
        rows: Rows = importlib.import_module("megatron_croc.ops.attention.triton_rows").TRITON_ROWS
        ones = torch.ones(2, 1, 8, device=device)
        zeros = torch.zeros(1, 2, device=device)
        rows.merge(ones.clone(), zeros.clone(), ones, zeros, torch.arange(2, device=device))
    except ImportError as error:
        return TORCH_ROWS, f"triton cannot be imported ({first_line(error)})"
    # Compiling needs a driver, a C compiler and an assembler, and each fails in a way of its own.
    except Exception as error:
        return TORCH_ROWS, f"triton does not compile here ({first_line(error)})"
    return rows, None
