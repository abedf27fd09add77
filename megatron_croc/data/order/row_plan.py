"""The plan of a run's packs, computed window by window from a few integers.

    counts per source --blend--> source of each sample --permutation--> (epoch, sample)   a window
                                                                             |
    separate:  one sample per pack, in this order                            |
    grouped:   one sample per pack, whole steps of one modality  <-----------+
    packed:    as many samples per pack as fit
      each of them, balanced: in steps that replicas can share evenly

A window is a number of consecutive samples of the blend. An epoch is cut into windows, so every
sample is in exactly one pack of each epoch. Begin and content of a window depend on the counts
alone, not on ranks, micro-batches or workers. A checkpoint stores the counts (OrderState). Balanced
packs also depend on the number of packs before the window: steps begin at its multiples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from megatron_croc.config.data import DataConfig
from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.order.batching import Arrangement, Packs, build_arrangement, separate
from megatron_croc.data.order.blend import Blend, read_blend
from megatron_croc.data.order.permutation import SHUFFLE, Permutation
from megatron_croc.errors import DataError
from megatron_croc.log import get_logger

_SAME_AGAIN = (
    "Resume with the same data_path, blend, seed, packing, grouping and balancing, or start a new "
    "run with --pretrained-checkpoint"
)
"""Way out of a checkpoint of another order or of other samples."""

logger = get_logger(__name__)


class Slot(NamedTuple):
    """One sample of a pack."""

    epoch: int
    """Epoch of the sample's source."""

    index: int
    """Number of the sample in the dataset of all folders."""

    planned_tokens: int | None = None
    """Tokens of the sample that the pack was planned with; None without packing."""

    cost: float | None = None
    """Predicted operations of the sample; None without balancing."""


Pack = tuple[Slot, ...]


@dataclass(frozen=True, kw_only=True)
class OrderState:
    """Position of a run in its order of samples; sufficient to resume."""

    identity: str
    """All parameters of the order; a run with another identity cannot resume from this state."""

    sources: tuple[str, ...]
    """Names of the sources."""

    num_samples: tuple[int, ...]
    """Number of samples of each source."""

    consumed: tuple[int, ...]
    """Number of samples of each source used so far, over all epochs."""

    window_start: tuple[int, ...]
    """Number of samples of each source before the current window."""

    rows_taken: int = 0
    """Number of packs used of the current window."""

    packs_before: int = 0
    """Number of packs of all windows before the current one."""

    digests: tuple[str, ...] = ()
    """Digest of the samples of each source; empty in states of versions that did not keep it."""

    lengths_digest: str = ""
    """Digest of the sample lengths that packs and groups were made from; empty: of none."""

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs of each source so far, as a fraction."""
        pairs = zip(self.consumed, self.num_samples, strict=True)
        return dict(zip(self.sources, (n / size for n, size in pairs), strict=True))

    @classmethod
    def from_tree(cls, tree: dict) -> "OrderState":
        """Restore a state from JSON, which stores tuples as lists."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()
        }
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Consecutive samples of the run, arranged in packs."""

    source: np.ndarray
    """int64 [n], source of each sample."""

    epoch: np.ndarray
    """int64 [n], epoch of the source."""

    index: np.ndarray
    """int64 [n], number in the dataset of all folders."""

    planned_tokens: np.ndarray | None
    """int64 [n]; None without packing."""

    costs: np.ndarray | None
    """float64 [n], predicted operations; None without balancing."""

    packs: Packs
    """Indices of the samples of each pack in the arrays above."""

    def pack(self, number: int) -> Pack:
        """Return the samples of one pack."""
        return tuple(
            Slot(
                int(self.epoch[i]),
                int(self.index[i]),
                None if self.planned_tokens is None else int(self.planned_tokens[i]),
                None if self.costs is None else float(self.costs[i]),
            )
            for i in self.packs[number]
        )


class RowPlan:
    """The packs of a run. Holds no state; safe to share between threads."""

    def __init__(
        self, blend: Blend, arrangement: Arrangement, *, seed: int, shuffle: bool = True
    ) -> None:
        """Set the parameters of the order.

        Args:
            blend: sources and shares.
            arrangement: way to arrange samples in packs.
            seed: of the shuffles.
            shuffle: draw a new order in every epoch of a source; False: stored order.
        """
        self.blend, self.arrangement = blend, arrangement
        self._seed, self._shuffle = seed, shuffle
        self._sizes = tuple(source.num_samples for source in blend.sources)
        self._bases = np.cumsum((0, *self._sizes))
        mix = ", ".join(f"{s.num_samples} samples at {s.weight}" for s in blend.sources)
        self.identity = f"{arrangement.kind}; {mix}; seed {seed if shuffle else 'none'}"
        # Windows of nearly equal size: a short last window would pack badly.
        self._num_windows = math.ceil(blend.epoch_length / arrangement.window_size)

    def start(self) -> OrderState:
        """Return the state before the first pack."""
        zeros = (0,) * len(self._sizes)
        return OrderState(
            identity=self.identity,
            sources=tuple(source.name for source in self.blend.sources),
            num_samples=self._sizes,
            consumed=zeros,
            window_start=zeros,
            digests=tuple(source.digest for source in self.blend.sources),
            lengths_digest=self.arrangement.digest,
        )

    def check_state(self, state: OrderState) -> None:
        """Refuse a state of another order or of other samples.

        Raises:
            DataError: names what differs.
        """
        if state.identity != self.identity:
            raise DataError(
                f"the checkpoint belongs to another order of samples: {state.identity}; this "
                f"run's is {self.identity}. {_SAME_AGAIN}"
            )
        own = self.start()
        if not state.digests:
            logger.warning(
                "the checkpoint holds no digests of its data: only the sizes of its sources are "
                "compared with this run's"
            )
            return
        for source, was, now in zip(self.blend.sources, state.digests, own.digests, strict=True):
            if was != now:
                elsewhere = [
                    n for n, d in zip(state.sources, state.digests, strict=True) if d == now
                ]
                found = f"those of {elsewhere[0]}" if elsewhere else "other ones"
                raise DataError(
                    f"source {source.name} ({', '.join(source.folders)}) does not hold the samples "
                    f"that the checkpoint was trained on in its place (digest {was}), but {found} "
                    f"(digest {now}). {_SAME_AGAIN}"
                )
        if state.lengths_digest != own.lengths_digest:
            raise DataError(
                "the sample lengths of data_path are not those that the checkpoint's packs were "
                f"made from (digest {state.lengths_digest}, now {own.lengths_digest}): another "
                f"tokenizer or template, or lengths measured anew. {_SAME_AGAIN}"
            )

    def window(self, counts: Sequence[int], packs_before: int) -> Window:
        """Compute the window that begins after `counts` samples of each source, and some packs."""
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
        if self.arrangement.one_sample_per_pack:
            packs_before = begin  # also in states of versions that did not count packs
        packs, tokens, costs = self.arrangement.arrange(index, begin, packs_before)
        return Window(
            source=source,
            epoch=epoch,
            index=index,
            planned_tokens=tokens,
            costs=costs,
            packs=packs,
        )

    def num_packs(self, num_samples: int) -> int:
        """Count the packs of the whole windows among the first `num_samples` samples of the run."""
        if self.arrangement.one_sample_per_pack:
            return num_samples
        counts = np.zeros(len(self._sizes), dtype=np.int64)
        num_packs = 0
        while True:
            window = self.window(counts.tolist(), num_packs)
            counts += np.bincount(window.source, minlength=counts.size)
            if counts.sum() > num_samples:
                return num_packs
            num_packs += len(window.packs)


class RowStream:
    """Sequence of packs, from any state."""

    def __init__(self, plan: RowPlan, state: OrderState | None = None) -> None:
        """Args: plan: of the run. state: position to continue from; None: the start.

        Raises:
            DataError: the state belongs to another order or to other samples.
        """
        self._plan = plan
        if state is not None:
            plan.check_state(state)
        self.state = state or plan.start()
        self._consumed = np.array(self.state.consumed)
        self._packs_before = self.state.packs_before
        self._enter(self.state.window_start, self.state.rows_taken)

    def _enter(self, window_start: Sequence[int], rows_taken: int) -> None:
        self._window_start = tuple(window_start)
        self._window = self._plan.window(self._window_start, self._packs_before)
        self._rows_taken = rows_taken

    @property
    def num_packs(self) -> int:
        """Number of packs taken since the start of the run."""
        return self._packs_before + self._rows_taken

    def take(self, number: int) -> list[Pack]:
        """Return the next `number` packs and set `state` to the position after them."""
        packs: list[Pack] = []
        while len(packs) < number:
            window = self._window
            if self._rows_taken == len(window.packs):
                drawn = np.bincount(window.source, minlength=self._consumed.size)
                self._packs_before += len(window.packs)
                self._enter((np.array(self._window_start) + drawn).tolist(), 0)
                continue
            current = self._rows_taken
            packs.append(window.pack(current))
            np.add.at(self._consumed, window.source[list(window.packs[current])], 1)
            self._rows_taken += 1
        self.state = replace(
            self._plan.start(),
            consumed=tuple(self._consumed.tolist()),
            window_start=self._window_start,
            rows_taken=self._rows_taken,
            packs_before=self._packs_before,
        )
        return packs


def build_row_plan(
    data: DataConfig,
    *,
    num_visual_tokens: int,
    global_batch_size: int,
    seed: int,
    cost: SampleCost | None = None,
) -> RowPlan:
    """Plan the packs of training: shuffled, and packed, grouped or balanced as the settings ask.

    Args:
        data: data_path, packing, grouping, balancing, tokenizer and template.
        num_visual_tokens: N, visual tokens per image.
        global_batch_size: packs of one optimizer step.
        seed: of the run.
        cost: predicted operations of a sample; needed for balancing only.

    Raises:
        DataError: data is missing, or lacks the sample lengths that packing, grouping and balancing
            need.
    """
    blend = read_blend(data.data_path)
    arrangement = build_arrangement(
        data,
        blend,
        num_visual_tokens=num_visual_tokens,
        global_batch_size=global_batch_size,
        seed=seed,
        cost=cost,
    )
    return RowPlan(blend, arrangement, seed=seed)


def build_stored_order_plan(data_path: Sequence[str], *, seed: int) -> RowPlan:
    """Plan the packs of validation: one sample each, in stored order.

    Raises:
        DataError: data is missing or damaged.
    """
    return RowPlan(read_blend(data_path), separate(), seed=seed, shuffle=False)
