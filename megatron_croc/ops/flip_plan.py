"""How a mixed mask becomes two causal varlen calls: index lists, made once per row on the host."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CausalCall:
    """One causal varlen attention call: the rows it reads and where they are cut into pieces.

    Causal is aligned to the bottom right of each piece: its last query sees all of its keys.
    """

    queries: Tensor | None
    """int64 [n], positions in the query tensor; None: its first rows, in order."""

    keys: Tensor | None
    """int64 [m], positions in the row; None: its first rows, in order."""

    cu_queries: Tensor
    """int32 [c + 1], where the pieces of the queries begin."""

    cu_keys: Tensor
    """int32 [c + 1], where the pieces of the keys begin."""

    num_queries: int
    """cu_queries[-1], on the host; the rows behind it belong to no piece."""

    num_keys: int
    """cu_keys[-1], on the host."""

    keys_are_distinct: bool
    """No key is read by two pieces; pieces of one sample, cut by chunks, share keys."""

    max_queries: int
    """Queries of the longest piece."""

    max_keys: int
    """Keys of the longest piece."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "CausalCall":
        """The same call on `device`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            queries=None if self.queries is None else move(self.queries),
            keys=None if self.keys is None else move(self.keys),
            cu_queries=move(self.cu_queries),
            cu_keys=move(self.cu_keys),
        )


@dataclass(frozen=True, kw_only=True)
class FlipPlan:
    """Two causal calls whose disjoint key sets make up the mask.

    `causal` is the lower triangle of every sample. What a span [b, e) adds is its strictly upper
    triangle, and that is causal once it is read backwards: queries e - 2 .. b, keys e - 1 .. b + 1.

        span of 4        keys    b   b+1 b+2 b+3         reversed keys  b+3 b+2 b+1
        query b                  c    x   x   x          query b+2       x
        query b+1                c    c   x   x    ->    query b+1       x   x
        query b+2                c    c   c   x          query b         x   x   x
        query b+3                c    c   c   c          c: causal call, x: flipped call
    """

    causal: CausalCall | None
    """None when none of the rows is a real token."""

    flipped: CausalCall | None
    """None when no span has two tokens or more among the rows."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "FlipPlan":
        """The same plan on `device`."""
        causal, flipped = (
            None if call is None else call.to(device, non_blocking=non_blocking)
            for call in (self.causal, self.flipped)
        )
        return FlipPlan(causal=causal, flipped=flipped)


def plan_flip(
    bounds: Sequence[int], spans: Sequence[tuple[int, int]], chunks: Sequence[tuple[int, int]]
) -> FlipPlan:
    """The plan of some rows of a packed row, on the CPU.

    Args:
        bounds: the row's cu_seqlens.
        spans: its bidirectional intervals, sorted and disjoint.
        chunks: ascending, disjoint intervals: the rows that are queries. The whole row is one
            chunk, [0, cu_seqlens[-1]).
    """
    causal: list[tuple[range, range]] = []
    flipped: list[tuple[range, range]] = []
    samples = list(itertools.pairwise(bounds))
    for shift, (begin, end) in _with_shifts(chunks):
        for first, last in samples:
            a, b = max(begin, first), min(end, last)
            if a < b:
                causal.append((range(a - shift, b - shift), range(first, b)))
        for first, last in spans:
            a, b = max(begin, first), min(end, last - 1)
            if a < b:
                queries = range(b - shift - 1, a - shift - 1, -1)
                flipped.append((queries, range(last - 1, a, -1)))
    # Padding ends the row and chunks ascend: the real queries are the first ones, in order.
    whole_row = list(chunks) == [(0, bounds[-1])]
    return FlipPlan(
        causal=_call(causal, index_queries=False, index_keys=not whole_row),
        flipped=_call(flipped, index_queries=True, index_keys=True),
    )


def _with_shifts(chunks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each chunk with what to subtract from a row's position to get its place among the queries."""
    held = 0
    for begin, end in chunks:
        yield begin - held, (begin, end)
        held += end - begin


def _call(
    pieces: Sequence[tuple[range, range]], *, index_queries: bool, index_keys: bool
) -> CausalCall | None:
    if not pieces:
        return None
    queries, keys = zip(*pieces, strict=True)
    cu_queries, cu_keys = (
        [0, *itertools.accumulate(map(len, ranges))] for ranges in (queries, keys)
    )
    return CausalCall(
        queries=_positions(queries) if index_queries else None,
        keys=_positions(keys) if index_keys else None,
        cu_queries=torch.tensor(cu_queries, dtype=torch.int32),
        cu_keys=torch.tensor(cu_keys, dtype=torch.int32),
        num_queries=cu_queries[-1],
        num_keys=cu_keys[-1],
        keys_are_distinct=_are_disjoint(keys),
        max_queries=max(map(len, queries)),
        max_keys=max(map(len, keys)),
    )


def _are_disjoint(ranges: Sequence[range]) -> bool:
    intervals = sorted((min(r[0], r[-1]), max(r[0], r[-1])) for r in ranges)
    return all(last < first for (_, last), (first, _) in itertools.pairwise(intervals))


def _positions(ranges: Sequence[range]) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop, r.step) for r in ranges])
