"""Packing: choose the samples of each pack such that packs are nearly full."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack samples by best-fit decreasing: longest first, each into the fullest pack with room.

    No sample is cut. The packs depend on the lengths alone.

    Args:
        lengths: tokens of each sample, each from 1 to `capacity`.
        capacity: most tokens of a pack.

    Returns:
        Indices of the samples of each pack, ascending.
    """
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[sample]
        assert 0 < length <= capacity, f"sample of {length} tokens, pack of {capacity}"
        place = bisect_left(spaces, (length, 0))
        if place == len(spaces):
            number, space = len(packs), capacity
            packs.append([])
        else:
            space, number = spaces.pop(place)
        packs[number].append(sample)
        if space > length:
            insort(spaces, (space - length, number))
    return [sorted(members) for members in packs]
