"""Several samples in one row: which ones, so that rows are nearly full."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: long samples first, each into the fullest row that still has room.

    Nothing is ever cut. The rows are a function of the lengths alone.

    Args:
        lengths: tokens of each sample, each from 1 to `capacity`.
        capacity: tokens a row holds.

    Returns:
        for each row the indices of its samples, ascending.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[sample]
        assert 0 < length <= capacity, f"sample of {length} tokens, row of {capacity}"
        place = bisect_left(spaces, (length, 0))
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space, row = spaces.pop(place)
        rows[row].append(sample)
        if space > length:
            insort(spaces, (space - length, row))
    return [sorted(row) for row in rows]
