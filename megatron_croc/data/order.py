"""The order of samples: computed, never consumed.

    position in the run --> (epoch, place in the epoch) --permutation of the epoch--> sample

Nothing here knows how many processes or workers there are, so a run that resumes at position k on
any layout sees exactly the samples it would have seen.
"""

import threading

import numpy as np

from megatron_croc.errors import DataError


class SampleOrder:
    """Every sample once per epoch, in an order drawn from (seed, epoch). Threads may share it."""

    def __init__(self, num_samples: int, seed: int, *, shuffle: bool = True) -> None:
        """Args: num_samples: samples per epoch. seed: of the shuffle. shuffle: False: 0, 1, ...

        Raises:
            DataError: no samples.
        """
        if num_samples < 1:
            raise DataError("data_path holds no samples: there is nothing to order")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self._cached: tuple[int, np.ndarray] | None = None
        self._lock = threading.Lock()

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) at a position of the run, counted from 0 over all epochs."""
        if position < 0:
            raise IndexError(f"position {position} is before the run")
        epoch, place = divmod(position, self.num_samples)
        return epoch, int(self._permutation(epoch)[place]) if self.shuffle else place

    def _permutation(self, epoch: int) -> np.ndarray:
        """int64 [num_samples]; the last one asked for is kept (1.3 s to draw at 20 M samples)."""
        with self._lock:
            if self._cached is None or self._cached[0] != epoch:
                generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
                self._cached = (epoch, generator.permutation(self.num_samples))
            return self._cached[1]
