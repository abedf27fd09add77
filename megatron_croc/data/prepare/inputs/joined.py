"""Several files as one input, each read by its own format and columns."""

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_croc.data.prepare.inputs.base import InputNote, InputRecord, InputSlice, RecordInput


@dataclass(frozen=True, kw_only=True)
class JoinedSlice:
    """Slices of consecutive files."""

    parts: tuple[tuple[int, InputSlice], ...]
    """(number of the file's first record in the whole input, slice of the file)."""

    def read(self) -> Iterator[InputRecord]:
        """Yield the records, numbered through."""
        for before, part in self.parts:
            for found in part.read():
                yield replace(found, number=before + found.number) if before else found


class JoinedInput:
    """Inputs laid end to end."""

    def __init__(self, inputs: Sequence[RecordInput], notes: Sequence[InputNote] = ()) -> None:
        """Args: inputs: at least one. notes: on the choice of the files."""
        self._inputs = list(inputs)
        counts = (one.num_records for one in self._inputs)
        self._starts = list(itertools.accumulate(counts, initial=0))
        self.num_records = self._starts[-1]
        digests = [one.digest for one in self._inputs]
        self.digest = (
            digests[0]
            if len(digests) == 1
            else hashlib.sha256("\n".join(digests).encode()).hexdigest()
        )
        self.notes = [*notes, *(note for one in self._inputs for note in one.notes)]

    def slice(self, begin: int, end: int) -> JoinedSlice:
        """Return the records begin .. end - 1."""
        parts = []
        file = bisect.bisect_right(self._starts, begin) - 1
        while file < len(self._inputs) and (start := self._starts[file]) < end:
            stop = self._starts[file + 1]
            if start < stop:
                part = self._inputs[file].slice(max(begin - start, 0), min(end, stop) - start)
                parts.append((start, part))
            file += 1
        return JoinedSlice(parts=tuple(parts))
