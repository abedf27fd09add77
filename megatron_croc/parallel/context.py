"""Split of a pack over the context-parallel ranks.

A pack is split into 2 * CP context chunks; rank r holds chunks r and 2 * CP - 1 - r, as megatron's
rotary embedding expects. Under a causal mask all ranks then have the same number of pairs.

    pack   | 0 | 1 | 2 | 3 |          CP = 2: rank 0 holds chunks 0 and 3, rank 1 holds 1 and 2

Each rank computes a part of every gradient; the parts are summed over the ranks.
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor


@functools.cache
def _positions(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    chunks = torch.arange(length, device=device).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def local_positions(length: int, cp: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Positions of the pack on this rank, int64 [length / CP], in their order on this rank."""
    return _positions(length, cp.rank(), cp.size(), device)


@functools.cache
def _to_pack_order(length: int, size: int, device: torch.device) -> Tensor:
    order = torch.cat([_positions(length, rank, size, device) for rank in range(size)])
    return order.argsort()


def split_sequence(x: Tensor, cp: dist.ProcessGroup) -> Tensor:
    """x [T, ...], equal on all ranks -> [T / CP, ...] of this rank."""
    if cp.size() == 1:
        return x
    return x.index_select(0, local_positions(x.shape[0], cp, x.device))


def gather_sequence(x: Tensor, cp: dist.ProcessGroup) -> Tensor:
    """[T / CP, ...] of this rank -> the whole pack [T, ...] in order, on every rank.

    Backward sums the gradients of all ranks in float32; each rank gets its part of the sum.
    """
    if cp.size() == 1:
        return x
    gathered = _Gather.apply(x, cp)
    assert isinstance(gathered, Tensor)
    return gathered.index_select(0, _to_pack_order(gathered.shape[0], cp.size(), x.device))


def sequence_to_heads(x: Tensor, cp: dist.ProcessGroup) -> Tensor:
    """[T / CP, H, d] of all heads -> [T, H / CP, d] of this rank's heads, in the pack's order."""
    if cp.size() == 1:
        return x
    per_rank = x.unflatten(1, (cp.size(), -1)).transpose(0, 1)  # [CP, T / CP, H / CP, d]
    received = _AllToAll.apply(per_rank.contiguous(), cp)
    assert isinstance(received, Tensor)
    pack = received.flatten(0, 1)
    return pack.index_select(0, _to_pack_order(pack.shape[0], cp.size(), x.device))


def heads_to_sequence(x: Tensor, cp: dist.ProcessGroup) -> Tensor:
    """[T, H / CP, d] of this rank's heads, in the pack's order -> [T / CP, H, d] of all heads."""
    if cp.size() == 1:
        return x
    length = x.shape[0]
    order = torch.cat([_positions(length, r, cp.size(), x.device) for r in range(cp.size())])
    per_rank = x.index_select(0, order).unflatten(0, (cp.size(), -1))  # [CP, T / CP, H / CP, d]
    received = _AllToAll.apply(per_rank.contiguous(), cp)
    assert isinstance(received, Tensor)
    return received.transpose(0, 1).flatten(1, 2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cp: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.cp, ctx.length = cp, x.shape[0]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(cp.size())]
        dist.all_gather(parts, x, group=cp)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        # In float32, because the queries of all ranks add to the same keys. An all-reduce, because
        # gloo has no reduce-scatter; keys and values are small.
        total = grad.float()
        dist.all_reduce(total, group=ctx.cp)
        mine = total[ctx.cp.rank() * ctx.length : (ctx.cp.rank() + 1) * ctx.length]
        return mine.to(grad.dtype), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cp: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.cp = cp
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=cp)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad = grad.contiguous()  # before empty_like, which would copy its strides
        out = torch.empty_like(grad)
        dist.all_to_all_single(out, grad, group=ctx.cp)
        return out, None
