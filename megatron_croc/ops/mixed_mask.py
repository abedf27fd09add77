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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_croc.errors import DataError


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
        return cls(
            cu_seqlens=torch.tensor(cu, dtype=torch.int32),
            spans=torch.tensor(list(spans), dtype=torch.int32).reshape(-1, 2),
            bounds=cu,
            span_bounds=tuple((int(begin), int(end)) for begin, end in spans),
            length=length,
            max_seqlen=max(b - a for a, b in itertools.pairwise(cu)),
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
        )

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
