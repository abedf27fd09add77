"""Balanced packs of a run: every sample once, the same steps at any layout, from any state."""

import json
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.config.data import DataConfig
from megatron_croc.config.training import TrainingConfig
from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.loader import MicroBatchLoader
from megatron_croc.data.order import batching
from megatron_croc.data.order.balance import imbalance
from megatron_croc.data.order.batching import balanced, grouped, packed, separate
from megatron_croc.data.order.blend import Blend, Source
from megatron_croc.data.order.row_plan import OrderState, RowPlan, RowStream
from megatron_croc.errors import DataError

GLOBAL, REPLICAS, CAPACITY = 24, 4, 100

COST = SampleCost(
    per_token=1.0,
    per_pair=0.01,
    per_label=0.5,
    per_image=20.0,
    num_visual_tokens=4,
    has_spans=True,
)


def tokens_of(index):
    """Made-up tokens and images of samples, with a long tail."""
    return 5 + (index * 37 % 96) * (index * 7 % 5) // 4, index % 3


BUFFER = 160

BASES = {
    "separate": separate,
    "grouped": lambda: grouped(tokens_of, global_batch_size=GLOBAL, seed=3),
    "packed": lambda: packed(
        tokens_of, packing_length=CAPACITY, packing_buffer_size=BUFFER, measured="", seed=3
    ),
}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(batching, "GROUPED_WINDOW", 4)


def plan_of(kind: str, sizes, weights, *, seed=1, replicas=REPLICAS) -> RowPlan:
    sources = [
        Source(name=f"s{i}", folders=(), num_samples=size, weight=Fraction(weight))
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    blend = Blend(sources=tuple(sources), epoch_length=sum(sizes))
    arrangement = balanced(
        BASES[kind](),
        tokens_of,
        cost=COST,
        replicas=replicas,
        global_batch_size=GLOBAL,
        seed=3,
    )
    return RowPlan(blend, arrangement, seed=seed)


class SlotBuilder:
    """Stands in for reading and decoding: hands the slots through."""

    def build(self, slots):
        return SlotBatch(slots), []


class SlotBatch:
    def __init__(self, slots):
        self.sample_ids = tuple(slots)


def read_step(plan, state, *, dp_size, micro_batch_size):
    """Micro-batches of each rank in the next step, and the state after it, the same on each."""
    training = TrainingConfig(micro_batch_size=micro_batch_size, global_batch_size=GLOBAL)
    ranks, states = [], []
    for rank in range(dp_size):
        with MicroBatchLoader(
            builder=SlotBuilder(), plan=plan, data=DataConfig(num_workers=0), training=training,
            state=state, dp_rank=rank, dp_size=dp_size,
        ) as batches:  # fmt: skip
            count = GLOBAL // (micro_batch_size * dp_size)
            ranks.append([next(batches).sample_ids for _ in range(count)])
            states.append(batches.state)
    assert all(state == states[0] for state in states)
    return ranks, states[0]


LAYOUTS = [(1, 1), (1, 24), (2, 3), (3, 4), (4, 2), (4, 6), (8, 1), (8, 3), (24, 1)]


@pytest.mark.parametrize("kind", BASES)
@settings(deadline=None, max_examples=12)
@given(
    sources=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 9)), min_size=1, max_size=3),
    schedule=st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=8),
)
def test_every_step_resumes_at_any_layout_with_the_same_packs(kind, sources, schedule):
    """Each step on other replicas and micro-batches, from the state saved before it."""
    plan = plan_of(kind, *zip(*sources, strict=True))
    whole, state = RowStream(plan), plan.start()
    for dp_size, micro_batch_size in schedule:
        ranks, state = read_step(plan, state, dp_size=dp_size, micro_batch_size=micro_batch_size)
        expected = Counter(slot for pack in whole.take(GLOBAL) for slot in pack)
        held = Counter(slot for rank in ranks for batch in rank for slot in batch)
        assert held == expected
        assert state == whole.state
        state = OrderState.from_tree(json.loads(json.dumps(asdict(state))))
    assert whole.num_packs == GLOBAL * len(schedule)


@pytest.mark.parametrize("kind", BASES)
@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 400), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_sample_once_per_epoch(kind, size, epochs, seed):
    plan = plan_of(kind, [size], [1], seed=seed)
    packs = RowStream(plan).take(plan.num_packs(size * epochs))
    slots = Counter((slot.epoch, slot.index) for pack in packs for slot in pack)
    assert slots == Counter((epoch, i) for epoch in range(epochs) for i in range(size))
    for pack in packs:
        assert len(pack) == 1 or sum(slot.planned_tokens for slot in pack) <= CAPACITY
        for slot in pack:
            assert slot.cost == COST(*tokens_of(np.array([slot.index])))[0]


@pytest.mark.parametrize("kind", BASES)
def test_each_source_of_a_blend_has_its_share(kind):
    """Exactly at the end of every window, as without balancing: only their order changes."""
    plan = plan_of(kind, [300, 500], [3, 1])
    stream = RowStream(plan)
    packs = stream.take(plan.num_packs(8000))
    assert stream.state.consumed == (6000, 2000)
    counts = Counter((slot.epoch, slot.index) for pack in packs for slot in pack)
    expected = [(e, i) for e in range(20) for i in range(300)]
    expected += [(e, i) for e in range(4) for i in range(300, 800)]
    assert counts == Counter(expected)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("layout", [(4, 2), (4, 1), (2, 3)])
def test_replicas_of_every_step_finish_together(monkeypatch, kind, layout):
    """Also in the steps that two windows share, and with packs, whose windows begin anywhere."""
    monkeypatch.setattr(batching, "GROUPED_WINDOW", 10)
    monkeypatch.setitem(globals(), "BUFFER", 600)
    plan = plan_of(kind, [5000], [1])
    dp_size, micro_batch_size = layout
    state, seen, costliest = plan.start(), [], set()
    for _ in range(16):
        ranks, state = read_step(plan, state, dp_size=dp_size, micro_batch_size=micro_batch_size)
        costs = np.array([[sum(s.cost for s in batch) for batch in rank] for rank in ranks])
        seen.append(imbalance(costs.sum(axis=1)))
        costliest.add(int(costs.sum(axis=1).argmax()))
        assert (np.diff(costs, axis=1) <= 1e-9).all()  # the costliest micro-batch comes first
    assert np.mean(seen) < 0.02
    assert len(costliest) > 1  # not always the same replica


@pytest.mark.parametrize("packs_before", [0, 7, 23])
def test_steps_of_packs_begin_where_steps_do(packs_before):
    """After a number of packs that is not one of samples: groups of alike packs lie in one step."""
    arrange = plan_of("packed", [600], [1]).arrangement.arrange
    packs, _, sample_costs = arrange(np.arange(600), 600, packs_before)
    costs = np.array([sample_costs[pack].sum() for pack in packs])
    first = -packs_before % GLOBAL
    steps = costs[first : first + (costs.size - first) // GLOBAL * GLOBAL].reshape(-1, GLOBAL)
    groups = sorted(np.sort(steps, axis=1).reshape(-1, REPLICAS).tolist())
    assert len(groups) >= 36
    assert sum(a[-1] > b[0] + 1e-9 for a, b in pairwise(groups)) <= 2


def test_a_seed_decides_the_order_and_the_rest_is_part_of_its_identity():
    """Steps differ between seeds and windows; a state of another balance is refused."""

    def steps(plan: RowPlan) -> list[frozenset]:
        stream = RowStream(plan)
        return [frozenset(slot[:2] for p in stream.take(GLOBAL) for slot in p) for _ in range(12)]

    first = steps(plan_of("separate", [400], [1]))
    assert first == steps(plan_of("separate", [400], [1]))
    assert not set(first) & set(steps(plan_of("separate", [400], [1], seed=2)))
    state = RowStream(plan_of("separate", [400], [1])).state
    for other in (plan_of("separate", [400], [1], replicas=2), plan_of("grouped", [400], [1])):
        with pytest.raises(DataError, match="another order of samples: separate samples, steps of"):
            RowStream(other, state)
    with pytest.raises(DataError, match="another order"):
        RowStream(RowPlan(plan_of("separate", [400], [1]).blend, separate(), seed=1), state)


RECORDED = {
    "separate": [(0,), (231,), (213,), (3,), (100,)],
    "grouped": [(195,), (90,), (75,), (180,), (150,)],
    "packed": [(27, 129), (12, 102), (126, 147), (249, 177), (186, 33, 46)],
}


@pytest.mark.parametrize("kind", RECORDED)
def test_packs_are_those_recorded(kind):
    """Seeds and keys are part of the checkpoint format: a resumed run counts on the same packs."""
    packs = RowStream(plan_of(kind, [150, 100], [2, 1])).take(5)
    assert [tuple(slot.index for slot in pack) for pack in packs] == RECORDED[kind]
