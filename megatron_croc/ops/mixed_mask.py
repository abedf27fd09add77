"""Mixed attention mask of a pack, stored as a few integers: one interval of keys per position.

The samples of a pack of `length` positions are placed one after the other. Position t sees exactly
the keys [start[t], end[t]): start is the first position of its sample; end is t + 1 (causal), or
the end of the span of t (positions of one span see each other). Neither start nor end decreases.
Causal, prefix, visual, packed and padded masks all have this form.

    sample 0                 sample 1          padding
    |text [ image span ] text|[span] text      |......|
    ^cu_seqlens[0]           ^cu_seqlens[1]    ^cu_seqlens[-1]   length

`prefix` is one span per sample, [sample start, first label); `visual` is one span per image.
Padding, from cu_seqlens[-1] on, sees itself only, so that its softmax is finite.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_croc.errors import DataError
from megatron_croc.ops.flip_plan import FlipPlan, plan_flip


@dataclass(frozen=True, kw_only=True)
class MixedMask:
    """Compact mask of one pack; the data layer builds it on the CPU, `to` copies it to a device."""

    cu_seqlens: Tensor
    """int32 [samples + 1], ascending from 0: beginnings of the samples, and the end of the last."""

    spans: Tensor
    """int32 [m, 2], sorted, disjoint half-open intervals, each inside one sample; m may be 0."""

    bounds: tuple[int, ...]
    """cu_seqlens as Python integers, readable on the host without a device sync."""

    span_bounds: tuple[tuple[int, int], ...]
    """spans as Python integers."""

    length: int
    """Positions of the pack, including padding."""

    max_seqlen: int
    """Length of the longest sample."""

    flip: FlipPlan
    """Plan of the whole pack as two causal calls."""

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
            spans: bidirectional intervals [begin, end) of positions, sorted.
            length: positions of the pack; default cu_seqlens[-1] (no padding).
            sample_ids: names for error messages, one per sample; default: its number in the pack.

        Raises:
            DataError: boundaries do not ascend from 0, or exceed `length`; a span is empty, out of
                order, overlaps another or crosses the end of its sample. The message names the
                sample and the values.
        """
        cu = tuple(int(x) for x in cu_seqlens)
        length = cu[-1] if length is None else length
        _check_samples(cu, length, sample_ids)
        _check_spans(cu, spans, sample_ids)
        span_bounds = tuple((int(begin), int(end)) for begin, end in spans)
        return cls(
            cu_seqlens=torch.tensor(cu, dtype=torch.int32),
            spans=torch.tensor(span_bounds, dtype=torch.int32).reshape(-1, 2),
            bounds=cu,
            span_bounds=span_bounds,
            length=length,
            max_seqlen=max(b - a for a, b in itertools.pairwise(cu)),
            flip=plan_flip(cu, span_bounds, [(0, cu[-1])]),
        )

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.bounds) - 1

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.cu_seqlens.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "MixedMask":
        """Copy the mask to `device`."""
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            spans=self.spans.to(device, non_blocking=non_blocking),
            flip=self.flip.to(device, non_blocking=non_blocking),
        )

    def flip_of(self, chunks: Sequence[tuple[int, int]]) -> FlipPlan:
        """Plan for some positions against the whole pack; made once per mask, on the host.

        Args:
            chunks: ascending, disjoint intervals of the pack, such as the context chunks of a rank;
                the query tensor holds their positions, one chunk after the other.
        """
        chunks = tuple(chunks)
        if chunks not in self._chunk_plans:
            plan = plan_flip(self.bounds, self.span_bounds, chunks)
            self._chunk_plans[chunks] = plan.to(self.device, non_blocking=True)
        return self._chunk_plans[chunks]

    def intervals(self) -> tuple[Tensor, Tensor]:
        """Return (start, end), int64 [length] each: position t sees the keys [start[t], end[t])."""
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
        """Return the dense mask, bool [length, length], True if query (row) sees key (column)."""
        start, end = self.intervals()
        key = torch.arange(self.length, device=self.device)
        return (key >= start[:, None]) & (key < end[:, None])


def _name(sample: int, sample_ids: Sequence[str] | None) -> str:
    return f"#{sample} of the pack" if sample_ids is None else sample_ids[sample]


def _check_samples(cu: Sequence[int], length: int, sample_ids: Sequence[str] | None) -> None:
    if len(cu) < 2 or cu[0] != 0:
        raise DataError(f"cu_seqlens must begin with 0 and contain a sample, got {[*cu]}")
    if sample_ids is not None and len(sample_ids) != len(cu) - 1:
        raise DataError(f"cu_seqlens {[*cu]} contain {len(cu) - 1} samples, not {len(sample_ids)}")
    for sample, (begin, end) in enumerate(itertools.pairwise(cu)):
        if begin >= end:
            raise DataError(
                f"sample {_name(sample, sample_ids)}: cu_seqlens give it the tokens "
                f"[{begin}, {end}), but they must ascend and no sample may be empty"
            )
    past = next((sample for sample, end in enumerate(cu[1:]) if end > length), None)
    if past is not None:
        raise DataError(
            f"sample {_name(past, sample_ids)}: cu_seqlens end it at {cu[past + 1]}, past the "
            f"pack's {length} positions"
        )


def _check_spans(
    cu: Sequence[int], spans: Sequence[tuple[int, int]], sample_ids: Sequence[str] | None
) -> None:
    previous: tuple[int, int] | None = None
    for begin, end in spans:
        sample = min(max(bisect.bisect_right(cu, begin) - 1, 0), len(cu) - 2)
        fault = None
        if begin >= end:
            fault = "is empty"
        elif begin < cu[sample] or end > cu[sample + 1]:
            fault = f"is not inside the sample's tokens [{cu[sample]}, {cu[sample + 1]})"
        elif previous is not None and begin < previous[1]:
            before = f"[{previous[0]}, {previous[1]})"
            overlaps = end > previous[0]
            fault = f"{'overlaps' if overlaps else 'is not sorted: it follows'} the span {before}"
        if fault is not None:
            raise DataError(f"sample {_name(sample, sample_ids)}: span [{begin}, {end}) {fault}")
        previous = (begin, end)
