"""Which samples make up which row of the run: computed window by window, from a few integers.

    counts per source --blend--> source of each sample --permutation--> (epoch, sample)   a window
                                                                             |
    separate:  one sample a row, in this order                               |
    grouped:   one sample a row, whole steps of one modality     <-----------+
    packed:    as many samples a row as fit

A window is some consecutive samples of the blend; an epoch is cut into windows, so every sample
stands in exactly one row of each epoch. Where a window begins and what it holds depends on the
counts alone: not on ranks, micro-batches or workers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_croc.config.data import DataConfig
from megatron_croc.data.order.batching import Arrangement, Rows, build_arrangement, separate
from megatron_croc.data.order.blend import Blend, read_blend
from megatron_croc.data.order.permutation import SHUFFLE, Permutation
from megatron_croc.errors import DataError


class Slot(NamedTuple):
    """One sample's place in a row."""

    epoch: int
    """Pass over the sample's source."""

    index: int
    """Its number in the dataset of all folders."""

    planned_tokens: int | None = None
    """Tokens the row was planned with; None where rows are not packed."""


Row = tuple[Slot, ...]


@dataclass(frozen=True, kw_only=True)
class OrderState:
    """Where a run stands in its order of samples: all that a resumed run needs."""

    identity: str
    """What the order is a function of; a run with another one cannot go on from here."""

    sources: tuple[str, ...]
    """Names of the sources."""

    num_samples: tuple[int, ...]
    """Samples of each source."""

    consumed: tuple[int, ...]
    """Samples of each source done so far, over all its epochs."""

    window_start: tuple[int, ...]
    """Samples of each source before the current window."""

    rows_taken: int = 0
    """Rows of the current window done."""

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source so far."""
        pairs = zip(self.consumed, self.num_samples, strict=True)
        return dict(zip(self.sources, (n / size for n, size in pairs), strict=True))

    @classmethod
    def from_tree(cls, tree: dict) -> "OrderState":
        """Back from JSON, which has lists for tuples."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()
        }
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Consecutive samples of the run, arranged in rows."""

    source: np.ndarray
    """int64 [n]."""

    epoch: np.ndarray
    """int64 [n], pass over the source."""

    index: np.ndarray
    """int64 [n], number in the dataset of all folders."""

    planned_tokens: np.ndarray | None
    """int64 [n]; None where rows are not packed."""

    rows: Rows
    """For each row the places of its samples in the arrays above."""

    def row(self, number: int) -> Row:
        """One row's samples."""
        return tuple(
            Slot(
                int(self.epoch[i]),
                int(self.index[i]),
                None if self.planned_tokens is None else int(self.planned_tokens[i]),
            )
            for i in self.rows[number]
        )


class RowPlan:
    """The rows of a run. Holds no state; threads may share it."""

    def __init__(
        self, blend: Blend, arrangement: Arrangement, *, seed: int, shuffle: bool = True
    ) -> None:
        """Bind what the rows are a function of.

        Args:
            blend: sources and shares.
            arrangement: how samples become rows.
            seed: of the shuffles.
            shuffle: a new order in every epoch of a source; False: as stored.
        """
        self.blend, self.arrangement = blend, arrangement
        self._seed, self._shuffle = seed, shuffle
        self._sizes = tuple(source.num_samples for source in blend.sources)
        self._bases = np.cumsum((0, *self._sizes))
        mix = ", ".join(f"{s.num_samples} samples at {s.weight}" for s in blend.sources)
        self.identity = f"{arrangement.kind}; {mix}; seed {seed if shuffle else 'none'}"
        # Near-equal windows: a short last one would pack badly.
        self._num_windows = math.ceil(blend.epoch_length / arrangement.window_size)

    def start(self) -> OrderState:
        """Before the first row."""
        zeros = (0,) * len(self._sizes)
        return OrderState(
            identity=self.identity,
            sources=tuple(source.name for source in self.blend.sources),
            num_samples=self._sizes,
            consumed=zeros,
            window_start=zeros,
        )

    def window(self, counts: Sequence[int]) -> Window:
        """The window that begins after `counts` samples of each source."""
        begin = sum(counts)
        length = self.blend.epoch_length
        place = begin % length
        number = -(-place * self._num_windows // length)
        assert number * length // self._num_windows == place, "no window begins here"
        end = (number + 1) * length // self._num_windows
        source = self.blend.draw(counts, end - place)
        epoch, index = np.empty_like(source), np.empty_like(source)
        for number, size in enumerate(self._sizes):
            here = np.flatnonzero(source == number)
            passes, places = np.divmod(counts[number] + np.arange(here.size), size)
            epoch[here] = passes
            if self._shuffle:
                for one in np.unique(passes):
                    key = (SHUFFLE, self._seed, number, int(one))
                    places[passes == one] = Permutation(size, key)(places[passes == one])
            index[here] = places + self._bases[number]
        rows, tokens = self.arrangement.arrange(index, begin)
        return Window(source=source, epoch=epoch, index=index, planned_tokens=tokens, rows=rows)

    def num_rows(self, num_samples: int) -> int:
        """Rows of the whole windows among the first `num_samples` samples of the run."""
        if self.arrangement.one_sample_a_row:
            return num_samples
        counts = np.zeros(len(self._sizes), dtype=np.int64)
        rows = 0
        while True:
            window = self.window(counts.tolist())
            counts += np.bincount(window.source, minlength=counts.size)
            if counts.sum() > num_samples:
                return rows
            rows += len(window.rows)


class RowStream:
    """Rows one after the other, from any state."""

    def __init__(self, plan: RowPlan, state: OrderState | None = None) -> None:
        """Args: plan: of the run. state: where to go on; None: at the start.

        Raises:
            DataError: the state belongs to another order.
        """
        self._plan = plan
        self.state = plan.start() if state is None else state
        if self.state.identity != plan.identity:
            raise DataError(
                f"the checkpoint stands in another order of samples: {self.state.identity}; this "
                f"run's is {plan.identity}. Resume with the same data_path, blend, seed, packing "
                "and grouping, or start a new run with --pretrained-checkpoint"
            )
        self._consumed = np.array(self.state.consumed)
        self._enter(self.state.window_start, self.state.rows_taken)

    def _enter(self, window_start: Sequence[int], rows_taken: int) -> None:
        self._window_start = tuple(window_start)
        self._window = self._plan.window(self._window_start)
        self._rows_taken = rows_taken

    def take(self, number: int) -> list[Row]:
        """The next rows; `state` then stands behind them."""
        rows: list[Row] = []
        while len(rows) < number:
            window = self._window
            if self._rows_taken == len(window.rows):
                drawn = np.bincount(window.source, minlength=self._consumed.size)
                self._enter((np.array(self._window_start) + drawn).tolist(), 0)
                continue
            row = self._rows_taken
            rows.append(window.row(row))
            np.add.at(self._consumed, window.source[list(window.rows[row])], 1)
            self._rows_taken += 1
        start = self._plan.start()
        self.state = OrderState(
            identity=start.identity,
            sources=start.sources,
            num_samples=start.num_samples,
            consumed=tuple(self._consumed.tolist()),
            window_start=self._window_start,
            rows_taken=self._rows_taken,
        )
        return rows


def build_row_plan(
    data: DataConfig, *, num_visual_tokens: int, global_batch_size: int, seed: int
) -> RowPlan:
    """Plan the packs of training: shuffled, and packed or grouped as the settings ask.

    Args:
        data: data_path, packing, grouping, tokenizer and template.
        num_visual_tokens: N, visual tokens per image.
        global_batch_size: packs of one optimizer step.
        seed: of the run.

    Raises:
        DataError: data is missing, or lacks the sample lengths that packing and grouping need.
    """
    blend = read_blend(data.data_path)
    arrangement = build_arrangement(
        data,
        blend,
        num_visual_tokens=num_visual_tokens,
        global_batch_size=global_batch_size,
        seed=seed,
    )
    return RowPlan(blend, arrangement, seed=seed)


def build_stored_order_plan(data_path: Sequence[str], *, seed: int) -> RowPlan:
    """Plan one sample per pack in stored order, never shuffled, packed or grouped: validation.

    Raises:
        DataError: data is missing or damaged.
    """
    return RowPlan(read_blend(data_path), separate(), seed=seed, shuffle=False)
