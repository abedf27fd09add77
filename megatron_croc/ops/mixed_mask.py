"""The mixed attention mask as row intervals: what each token may look at, in a few integers.

Samples are laid end to end in one row of `length` tokens. Row t sees exactly the keys
[start[t], end[t]): start is its sample's first token; end is t + 1 (causal), or the end of the
span t lies in (tokens of one span see each other). Both are non-decreasing, so causal, prefix,
visual, packed and padded masks are all one kind of object, and any backend can be fed from it.

    sample 0                 sample 1          padding
    |text [ image span ] text|[span] text      |......|
    ^cu_seqlens[0]           ^cu_seqlens[1]    ^cu_seqlens[-1]   length

`prefix` is one span per sample, [sample start, first label); `visual` is one span per image.
Padding rows, at and past cu_seqlens[-1], see only themselves, so a softmax over them is finite.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_croc.errors import DataError


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


@dataclass(frozen=True, kw_only=True)
class MixedMask:
    """Compact mask of one packed row; made on the CPU by the data layer, moved with `to`."""

    cu_seqlens: Tensor
    """int32 [B + 1], first 0, ascending: where samples begin; the last entry ends real tokens."""

    spans: Tensor
    """int32 [m, 2], sorted, disjoint half-open intervals, each inside one sample; m may be 0."""

    bounds: tuple[int, ...]
    """cu_seqlens as Python integers: to be read on the host without a device sync."""

    span_bounds: tuple[tuple[int, int], ...]
    """spans as Python integers."""

    length: int
    """Tokens of the row, padding included."""

    max_seqlen: int
    """Length of the longest sample."""

    flip: FlipPlan
    """The whole row as two causal calls."""

    _chunk_plans: dict[tuple[tuple[int, int], ...], FlipPlan] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def build(
        cls,
        cu_seqlens: Sequence[int],
        spans: Sequence[tuple[int, int]] = (),
        *,
        length: int | None = None,
        sample_ids: Sequence[str] | None = None,
    ) -> "MixedMask":
        """Validate and build a mask.

        Args:
            cu_seqlens: boundaries of the samples, starting at 0.
            spans: bidirectional intervals [begin, end) in row positions, sorted.
            length: tokens of the row; default cu_seqlens[-1] (no padding).
            sample_ids: names used in errors, one per sample.

        Raises:
            DataError: boundaries not ascending from 0, or past `length`; a span empty, unsorted,
                overlapping another or leaving its sample. Names the sample and the values.
        """
        cu = tuple(int(x) for x in cu_seqlens)
        length = cu[-1] if length is None else length
        if len(cu) < 2 or cu[0] != 0 or any(a >= b for a, b in itertools.pairwise(cu)):
            raise DataError(f"cu_seqlens must ascend from 0 without empty samples, got {[*cu]}")
        if cu[-1] > length:
            raise DataError(f"cu_seqlens end at {cu[-1]}, past the row's {length} tokens")
        sample, previous_end = 0, 0
        for begin, end in spans:
            while sample < len(cu) - 2 and begin >= cu[sample + 1]:
                sample += 1
            name = sample_ids[sample] if sample_ids is not None else f"#{sample}"
            inside = cu[sample] <= begin < end <= cu[sample + 1]
            if not inside or begin < previous_end:
                raise DataError(
                    f"sample {name}: span [{begin}, {end}) must be non-empty, come after the span "
                    f"before it (which ends at {previous_end}) and stay inside the sample "
                    f"[{cu[sample]}, {cu[sample + 1]})"
                )
            previous_end = end
        span_bounds = tuple((int(begin), int(end)) for begin, end in spans)
        return cls(
            cu_seqlens=torch.tensor(cu, dtype=torch.int32),
            spans=torch.tensor(span_bounds, dtype=torch.int32).reshape(-1, 2),
            bounds=cu,
            span_bounds=span_bounds,
            length=length,
            max_seqlen=max(b - a for a, b in itertools.pairwise(cu)),
            flip=_plan(cu, span_bounds, [(0, cu[-1])]),
        )

    @property
    def num_samples(self) -> int:
        """Samples in the row."""
        return len(self.bounds) - 1

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.cu_seqlens.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "MixedMask":
        """The same mask on `device`."""
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            spans=self.spans.to(device, non_blocking=non_blocking),
            flip=self.flip.to(device, non_blocking=non_blocking),
        )

    def flip_of(self, chunks: Sequence[tuple[int, int]]) -> FlipPlan:
        """The plan of some rows against the whole row; made once per mask and on the host.

        Args:
            chunks: ascending, disjoint intervals of the row; the query tensor holds their rows one
                chunk after the other. Context parallel cuts the row into such chunks.
        """
        chunks = tuple(chunks)
        if chunks not in self._chunk_plans:
            plan = _plan(self.bounds, self.span_bounds, chunks)
            self._chunk_plans[chunks] = plan.to(self.device, non_blocking=True)
        return self._chunk_plans[chunks]

    def intervals(self) -> tuple[Tensor, Tensor]:
        """(start, end), int64 [length] each: row t sees the keys [start[t], end[t])."""
        position = torch.arange(self.length, device=self.device)
        cu = self.cu_seqlens.long()
        sample = torch.searchsorted(cu, position, right=True) - 1
        is_padding = position >= cu[-1]
        start = torch.where(is_padding, position, cu[sample])
        end = position + 1
        if self.spans.numel():
            begins, ends = self.spans.long().unbind(1)
            span = (torch.searchsorted(begins.contiguous(), position, right=True) - 1).clamp(min=0)
            in_span = (position >= begins[span]) & (position < ends[span])
            end = torch.where(in_span, ends[span], end)
        return start, end

    def visible(self) -> Tensor:
        """The dense mask, bool [length, length]: row = query, True = the query sees the key."""
        start, end = self.intervals()
        key = torch.arange(self.length, device=self.device)
        return (key >= start[:, None]) & (key < end[:, None])


def _plan(
    bounds: Sequence[int], spans: Sequence[tuple[int, int]], chunks: Sequence[tuple[int, int]]
) -> FlipPlan:
    """The plan of the rows of `chunks`; the whole row is one chunk, [0, cu_seqlens[-1])."""
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
