"""The flip's row operations in plain torch: the meaning, and what runs without Triton."""

import torch
from torch import Tensor

from megatron_croc.ops.attention.contract import QKV
from megatron_croc.ops.flip_plan import CausalCall


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
