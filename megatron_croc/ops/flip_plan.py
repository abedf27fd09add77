"""Plan of the flip: index lists for the two causal varlen calls that compute a mixed mask.

A plan is made once for each pack, on the CPU.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CausalCall:
    """One causal varlen attention call: its queries and keys, cut into pieces.

    A piece is one causal block: its last query sees all of its keys (bottom-right alignment).
    """

    queries: Tensor | None
    """int64 [n], places in the query tensor; None: the first ones, in order."""

    keys: Tensor | None
    """int64 [m], positions in the pack; None: the first ones, in order."""

    cu_queries: Tensor
    """int32 [c + 1], beginnings of the pieces among the queries, and their end."""

    cu_keys: Tensor
    """int32 [c + 1], beginnings of the pieces among the keys, and their end."""

    num_queries: int
    """cu_queries[-1], on the host; later queries belong to no piece."""

    num_keys: int
    """cu_keys[-1], on the host."""

    keys_are_distinct: bool
    """No key belongs to two pieces. Pieces of one sample that is cut by chunks share keys."""

    max_queries: int
    """Number of queries of the longest piece."""

    max_keys: int
    """Number of keys of the longest piece."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "CausalCall":
        """Copy the call to `device`."""

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
    """Two causal calls with disjoint keys; together they are the mask.

    `causal` is the lower triangle of every sample. `flipped` is the strictly upper triangle of
    every span [b, e). It is causal in reversed order: queries e - 2 .. b, keys e - 1 .. b + 1.

        span of 4        keys    b   b+1 b+2 b+3         reversed keys  b+3 b+2 b+1
        query b                  c    x   x   x          query b+2       x
        query b+1                c    c   x   x    ->    query b+1       x   x
        query b+2                c    c   c   x          query b         x   x   x
        query b+3                c    c   c   c          c: causal call, x: flipped call
    """

    causal: CausalCall | None
    """None if all queries are padding."""

    flipped: CausalCall | None
    """None if no query lies in a span before its last position."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "FlipPlan":
        """Copy the plan to `device`."""
        causal, flipped = (
            None if call is None else call.to(device, non_blocking=non_blocking)
            for call in (self.causal, self.flipped)
        )
        return FlipPlan(causal=causal, flipped=flipped)


def plan_flip(
    bounds: Sequence[int], spans: Sequence[tuple[int, int]], chunks: Sequence[tuple[int, int]]
) -> FlipPlan:
    """Make the plan for some positions of a pack, on the CPU.

    Args:
        bounds: cu_seqlens of the pack.
        spans: its bidirectional intervals, sorted and disjoint.
        chunks: ascending, disjoint intervals of positions that are queries. A whole pack is one
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
    # Chunks ascend and padding is last, so queries that are not padding come first, in order.
    is_whole_pack = list(chunks) == [(0, bounds[-1])]
    return FlipPlan(
        causal=_call(causal, index_queries=False, index_keys=not is_whole_pack),
        flipped=_call(flipped, index_queries=True, index_keys=True),
    )


def _with_shifts(chunks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each chunk, with the difference of its positions and their places in the query tensor."""
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
