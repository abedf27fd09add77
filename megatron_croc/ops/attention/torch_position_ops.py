"""Operations of the flip on positions, in plain torch: the reference, and the fallback."""

import torch
from torch import Tensor

from megatron_croc.ops.attention.contract import QKV, FlashOutput
from megatron_croc.ops.flip_plan import CausalCall


class TorchPositionOps:
    """Plain torch operations, on any device."""

    name = "torch operations"

    def gather(self, tensors: QKV, call: CausalCall) -> QKV:
        """See `PositionOps`."""
        query, key, value = tensors
        if call.queries is not None:
            query = query.index_select(0, call.queries)
        if call.keys is not None:
            key, value = (x.index_select(0, call.keys) for x in (key, value))
        return QKV(query, key, value)

    def merge(self, output: FlashOutput, more: FlashOutput, positions: Tensor) -> None:
        """See `PositionOps`."""
        before = output.out.index_select(0, positions)
        before_lse = output.lse.index_select(1, positions)
        weight = torch.sigmoid(more.lse - before_lse).t().unsqueeze(-1)  # [r, H, 1]
        merged = torch.lerp(before.to(weight.dtype), more.out.to(weight.dtype), weight)
        output.out.index_copy_(0, positions, merged.to(output.out.dtype))
        output.lse.index_copy_(1, positions, torch.logaddexp(before_lse, more.lse))

    def gather_outputs(
        self, grad: Tensor, output: FlashOutput, positions: Tensor
    ) -> tuple[Tensor, FlashOutput]:
        """See `PositionOps`."""
        out = output.out.index_select(0, positions)
        lse = output.lse.index_select(1, positions)
        return grad.index_select(0, positions), FlashOutput(out, lse)

    def add(self, totals: QKV, parts: QKV, call: CausalCall) -> None:
        """See `PositionOps`."""
        indices = (call.queries, call.keys, call.keys)
        for total, part, index in zip(totals, parts, indices, strict=True):
            if index is None:
                total[: part.shape[0]] += part
            else:
                total.index_add_(0, index, part)


TORCH_POSITION_OPS = TorchPositionOps()
