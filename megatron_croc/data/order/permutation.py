"""A random permutation of any length, computed element by element and never stored.

    index in the epoch --keyed bijection of [0, 2^bits)--> inside [0, n)?  yes: the sample
                              ^                                  |
                              +------------- no: again ----------+

The bijection is a Feistel network. Cycle walking (apply it until the value is below n) makes it a
permutation of n elements (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Every
element takes the same time, and none depends on earlier ones.
"""

import numpy as np

SHUFFLE, ARRANGE, BALANCE = 0, 1, 2
"""First word of every key, for independent random numbers: SHUFFLE for the order of a source in an
epoch, ARRANGE for the order of packs in a window, BALANCE for its steps."""

_ROUNDS = 10
"""Rounds of the network; the shuffle tests pass with 6 or more, for ranges as small as 3."""


class Permutation:
    """A permutation of 0 .. n - 1, drawn from a key. Safe to share between threads."""

    def __init__(self, n: int, key: tuple[int, ...]) -> None:
        """Args: n: length. key: non-negative integers; another key gives another permutation."""
        self.n = n
        bits = max((n - 1).bit_length(), 2)
        self._right = np.uint64(bits // 2)  # width of the right part; the left has the rest
        self._left = np.uint64(bits - bits // 2)
        words = np.random.SeedSequence(key).generate_state(2 * _ROUNDS, np.uint64)
        self._keys = list(zip(words[::2], words[1::2], strict=True))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the elements at `places` in [0, n), int64 of the same shape."""
        values = np.asarray(places).astype(np.uint64).reshape(-1)
        if self.n > 1:
            outside = np.arange(values.size)
            while outside.size:
                values[outside] = moved = self._mix(values[outside])
                outside = outside[moved >= self.n]  # on average at most half of them
        return values.astype(np.int64).reshape(np.shape(places))

    def _mix(self, values: np.ndarray) -> np.ndarray:
        """Apply the network once: uint64 [m] -> uint64 [m], a bijection of [0, 2^bits)."""
        left_bits, right_bits = self._left, self._right
        left, right = values >> right_bits, values & _mask(right_bits)
        for multiplier, offset in self._keys:
            # splitmix64's finalizer with a round key; its low bits are XORed to the other half.
            mixed = (right + offset) * (multiplier | np.uint64(1))
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & _mask(left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right


def _mask(bits: np.uint64) -> np.uint64:
    return np.uint64((1 << int(bits)) - 1)
