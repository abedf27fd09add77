"""The rows of a run are the same whoever reads them, and hold every sample once per epoch."""

import itertools
import json
from collections import Counter
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.data import DataConfig
from megatron_croc.config.training import TrainingConfig
from megatron_croc.data.loader import MicroBatchLoader
from megatron_croc.data.order import batching
from megatron_croc.data.order.batching import grouped, packed, separate
from megatron_croc.data.order.blend import Blend, Source
from megatron_croc.data.order.row_plan import OrderState, RowPlan, RowStream
from megatron_croc.errors import CheckpointError, DataError

CAPACITY = 100
GLOBAL = 24


def tokens_of(index):
    """Made-up tokens and images of samples."""
    return 5 + index * 37 % 96, index % 3


ARRANGEMENTS = {
    "separate": separate,
    "grouped": lambda: grouped(tokens_of, global_batch_size=GLOBAL, seed=3),
    "packed": lambda: packed(
        tokens_of, packing_length=CAPACITY, packing_buffer_size=32, measured="", seed=3
    ),
}


def plan_of(kind: str, sizes, weights, seed=1) -> RowPlan:
    sources = [
        Source(name=f"s{i}", folders=(), num_samples=size, weight=Fraction(weight))
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    blend = Blend(sources=tuple(sources), epoch_length=sum(sizes))
    return RowPlan(blend, ARRANGEMENTS[kind](), seed=seed)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(batching, "SEPARATE_WINDOW", 16)
    monkeypatch.setattr(batching, "GROUPED_WINDOW", 3)


class FakeBuilder:
    """Stands in for reading and decoding: hands the slots through."""

    def build(self, slots):
        return FakeBatch(slots), []


class FakeBatch:
    def __init__(self, slots):
        self.sample_ids = tuple(slots)


def read_step(plan, state, *, dp_size, micro_batch_size, workers):
    """The samples of the next global batch, by micro-batch in global order; the state after it."""
    data = DataConfig(num_workers=workers)
    training = TrainingConfig(micro_batch_size=micro_batch_size, global_batch_size=GLOBAL)
    per_rank, states = [], []
    for rank in range(dp_size):
        batches = MicroBatchLoader(
            builder=FakeBuilder(), plan=plan, data=data, training=training, state=state,
            dp_rank=rank, dp_size=dp_size,
        )  # fmt: skip
        with batches:
            count = GLOBAL // (micro_batch_size * dp_size)
            per_rank.append([next(batches).sample_ids for _ in range(count)])
            states.append(batches.state)
    assert all(state == states[0] for state in states)
    in_order = itertools.chain.from_iterable(zip(*per_rank, strict=True))
    return [slot for batch in in_order for slot in batch], states[0]


layouts = st.lists(
    st.tuples(
        st.sampled_from([(1, 1), (1, 24), (2, 3), (3, 4), (4, 2), (4, 6), (8, 1), (8, 3)]),
        st.sampled_from([0, 1, 4]),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("kind", ARRANGEMENTS)
@settings(deadline=None, max_examples=25)
@given(
    sources=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 9)), min_size=1, max_size=3),
    schedule=layouts,
)
def test_any_schedule_of_layouts_reads_the_same_rows(kind, sources, schedule):
    """Each step on other ranks, micro-batches and threads, from the state saved before it."""
    plan = plan_of(kind, *zip(*sources, strict=True))
    state, steps = plan.start(), []
    for (dp_size, micro_batch_size), workers in schedule:
        slots, state = read_step(
            plan, state, dp_size=dp_size, micro_batch_size=micro_batch_size, workers=workers
        )
        state = OrderState.from_tree(json.loads(json.dumps(asdict(state))))
        steps += slots
    whole = RowStream(plan)
    expected = [slot for row in whole.take(GLOBAL * len(schedule)) for slot in row]
    assert steps == expected
    assert state == whole.state
    assert sum(state.consumed) == len(steps)


@pytest.mark.parametrize("kind", ARRANGEMENTS)
@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 200), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_sample_once_per_epoch(kind, size, epochs, seed):
    plan = plan_of(kind, [size], [1], seed)
    rows = RowStream(plan).take(plan.num_packs(size * epochs))
    slots = Counter((slot.epoch, slot.index) for row in rows for slot in row)
    assert slots == Counter((epoch, i) for epoch in range(epochs) for i in range(size))
    for row in rows:
        assert len(row) == 1 or sum(slot.planned_tokens for slot in row) <= CAPACITY


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_each_source_of_a_blend_once_per_its_own_epoch(kind):
    plan = plan_of(kind, [30, 50], [3, 1])
    stream = RowStream(plan)
    slots = [slot for row in stream.take(plan.num_packs(800)) for slot in row]
    assert stream.state.consumed == (600, 200)
    assert stream.state.epochs == {"s0": 20.0, "s1": 4.0}
    counts = Counter((slot.epoch, slot.index) for slot in slots)
    expected = [(e, i) for e in range(20) for i in range(30)]
    expected += [(e, i) for e in range(4) for i in range(30, 80)]
    assert counts == Counter(expected)


def test_counted_rows_are_the_rows_of_the_epochs():
    plan = plan_of("packed", [150], [1])
    stream = RowStream(plan)
    stream.take(plan.num_packs(150))
    assert stream.state.consumed == (150,)
    stream.take(plan.num_packs(450) - plan.num_packs(150))
    assert stream.state.consumed == (450,)
    assert plan.num_packs(10) == 0 and plan.num_packs(0) == 0


@pytest.mark.parametrize("kind", ["separate", "grouped"])
def test_a_sample_is_a_row_without_packing(kind):
    """Also in the middle of a window: a run may end there."""
    plan = plan_of(kind, [150], [1])
    assert [plan.num_packs(n) for n in (0, 1, 7, 150, 301)] == [0, 1, 7, 150, 301]


def test_steps_that_cross_an_epoch_stay_grouped():
    plan = plan_of("grouped", [1000], [1])
    stream = RowStream(plan)
    kinds = [
        len({tokens_of(np.array([row[0].index]))[1][0] > 0 for row in stream.take(GLOBAL)})
        for _ in range(120)
    ]
    # Three steps a window here: one may be mixed, and one is shared with the next window.
    assert kinds.count(1) > 40


RECORDED = {
    "separate": [(11,), (14,), (40,), (12,), (6,), (36,)],
    "grouped": [(44,), (31,), (5,), (49,), (23,), (10,)],
    "packed": [(47, 28), (12, 6), (14, 4), (5,), (40, 35), (29, 46)],
}


@pytest.mark.parametrize("kind", RECORDED)
def test_rows_are_those_recorded(kind):
    """Seeds and keys are part of the checkpoint format: a resumed run counts on the same rows."""
    rows = RowStream(plan_of(kind, [30, 20], [2, 1])).take(6)
    assert [tuple(slot.index for slot in row) for row in rows] == RECORDED[kind]


def orders_of(plan: RowPlan, sizes: list[int], epochs: int) -> list[tuple[int, ...]]:
    """Order of each source in each epoch, as numbers within the source."""
    rows = RowStream(plan).take(sum(sizes) * epochs)
    orders = {}
    for (slot,) in rows:
        source = int(np.searchsorted(np.cumsum(sizes), slot.index, side="right"))
        number = slot.index - sum(sizes[:source])
        orders.setdefault((source, slot.epoch), []).append(number)
    return [tuple(order) for _, order in sorted(orders.items()) if len(order) == sizes[0]]


def test_every_source_and_epoch_and_seed_has_an_order_of_its_own():
    sizes = [40, 40]
    orders = [
        order
        for seed in (1, 2)
        for order in orders_of(plan_of("separate", sizes, [1, 1], seed), sizes, 3)
    ]
    assert len(orders) == len(set(orders)) == 2 * 2 * 3
    for a, b in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 9  # Poisson of mean 1
    again = plan_of("separate", sizes, [1, 1], 1)
    assert orders_of(again, sizes, 3) == orders[:6]


@pytest.mark.parametrize("kind", ["grouped", "packed"])
def test_windows_and_seeds_have_an_order_of_their_own(kind):
    """The same samples, without the shuffle before: only the order of rows in a window is left."""

    def rows_of(seed: int, number: int) -> tuple:
        arranged = {
            "grouped": lambda: grouped(tokens_of, global_batch_size=2, seed=seed),
            "packed": lambda: packed(
                tokens_of, packing_length=CAPACITY, packing_buffer_size=96, measured="", seed=seed
            ),
        }[kind]().arrange(np.arange(96), number, number)[0]
        return tuple(tuple(int(i) for i in row) for row in arranged)

    drawn = [rows_of(seed, number) for seed in (1, 2) for number in (0, 96)]
    assert len(set(drawn)) == 4
    assert len({tuple(sorted(rows)) for rows in drawn}) == 1  # the rows themselves are the same


def test_as_stored():
    plan = plan_of("separate", [3], [1])
    plan = RowPlan(plan.blend, separate(), seed=1, shuffle=False)
    slots = [(row[0].epoch, row[0].index) for row in RowStream(plan).take(5)]
    assert slots == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_another_order_cannot_go_on():
    state = RowStream(plan_of("packed", [100], [1])).state
    for plan in (
        plan_of("separate", [100], [1]),
        plan_of("packed", [101], [1]),
        plan_of("packed", [100], [1], seed=2),
    ):
        with pytest.raises(DataError, match=r"another order of samples: packs of 100 .* seed 1;"):
            RowStream(plan, state)
    renamed = replace(state, sources=("moved",))
    RowStream(plan_of("packed", [100], [1]), renamed)


def test_a_checkpoint_keeps_the_state(tmp_path):
    stream = RowStream(plan_of("packed", [100, 40], [2, 1]))
    stream.take(13)
    TrainState(iteration=3, stage="finetune", order=stream.state).save(tmp_path)
    loaded = TrainState.load(tmp_path)
    assert loaded.order == loaded.resume_point() == stream.state
    assert (tmp_path / "train_state.json").stat().st_size < 1000
    with pytest.raises(CheckpointError, match=r"iteration 3 does not name .*--pretrained-checkpo"):
        TrainState(iteration=3).resume_point()
    assert TrainState().resume_point() is None


def with_digests(plan: RowPlan, *digests: str, lengths: str = "") -> RowPlan:
    sources = zip(plan.blend.sources, digests, strict=True)
    blend = replace(plan.blend, sources=tuple(replace(s, digest=d) for s, d in sources))
    return RowPlan(blend, replace(plan.arrangement, digest=lengths), seed=1)


def test_other_samples_cannot_go_on():
    """Of equal size, swapped, or packed by other lengths: each refused in one line."""
    plan = plan_of("packed", [50, 50], [1, 1])
    stream = RowStream(with_digests(plan, "aa", "bb", lengths="l"))
    stream.take(3)
    state = OrderState.from_tree(json.loads(json.dumps(asdict(stream.state))))
    RowStream(with_digests(plan, "aa", "bb", lengths="l"), state)
    for digests, lengths, reason in (
        (("bb", "aa"), "l", "source s0 .*but those of s1"),
        (("aa", "cc"), "l", "source s1 .*but other ones"),
        (("aa", "bb"), "m", "sample lengths of data_path are not those"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            RowStream(with_digests(plan, *digests, lengths=lengths), state)
        assert "\n" not in str(caught.value) and "--pretrained-checkpoint" in str(caught.value)
    RowStream(with_digests(plan, "cc", "dd"), replace(state, digests=()))  # an older checkpoint
