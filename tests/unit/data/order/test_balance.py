"""Steps that replicas share evenly: by hand, by properties, and on lengths like LLaVA's."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.order.balance import (
    compose_steps,
    deal,
    deal_micro_batches,
    imbalance,
)
from megatron_croc.data.synthetic import llava_like
from megatron_croc.recipes import get_recipe


def composed(costs, *, size, replicas, begin=0, kinds=None, seed=1):
    kinds = np.zeros(len(costs), dtype=bool) if kinds is None else kinds
    return compose_steps(
        np.asarray(costs, dtype=float),
        kinds,
        global_batch_size=size,
        replicas=replicas,
        begin=begin,
        key=(2, seed, begin),
    )


def test_differencing_by_hand():
    """8 7 | 6 5 | 4 2: the rounds that differ by 2 and 1 make 4+7, 2+8; then 6+(2+8), 5+(4+7)."""
    costs = np.array([7.0, 8, 5, 6, 2, 4])
    parts = deal(costs, 2)
    assert costs[parts].sum(axis=1).tolist() == [16, 16]
    assert sorted(sorted(costs[part].tolist()) for part in parts) == [[2, 6, 8], [4, 5, 7]]
    assert sorted(deal(costs, 1)[0].tolist()) == list(range(6))
    assert deal(costs, 6)[:, 0].tolist() == [1, 0, 3, 2, 5, 4]


def test_steps_by_hand():
    """Two steps of four for two replicas: each takes two cheap packs and two dear ones."""
    costs = np.array([1.0, 20, 10, 2, 1, 20, 2, 10])
    drawn = set()
    for seed in range(30):
        steps = composed(costs, size=4, replicas=2, seed=seed).reshape(2, 4)
        drawn.add(tuple(sorted(costs[steps[0]].tolist())))
        for step in steps:
            assert imbalance(costs[step][deal(costs[step], 2)].sum(axis=1)) == 0
    assert drawn == {(1, 1, 10, 10), (1, 1, 20, 20), (2, 2, 10, 10), (2, 2, 20, 20)}
    # In the order as it stands: 1 + 20 against 10 + 2, and 1 + 20 against 2 + 10.
    assert imbalance(np.array([21.0, 12.0])) == pytest.approx(21 / 16.5 - 1)


@settings(deadline=None, max_examples=60)
@given(
    parts=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
    turn=st.integers(0, 20),
)
def test_parts_are_equal_in_number_and_differ_by_less_than_the_widest_round(
    parts, width, seed, turn
):
    costs = np.random.default_rng(seed).lognormal(0.0, 1.0, parts * width)
    dealt = deal(costs, parts)
    assert dealt.shape == (parts, width)
    assert sorted(dealt.flatten().tolist()) == list(range(parts * width))
    sums = costs[dealt].sum(axis=1)
    widest = np.ptp(np.sort(costs).reshape(width, parts), axis=1).max()
    assert np.ptp(sums) <= widest + 1e-9
    # Each replica finds its own packs by itself; together they hold every pack once.
    sizes = [n for n in range(1, width + 1) if width % n == 0]
    for micro_batch_size in sizes:
        ranks = [
            deal_micro_batches(
                costs,
                dp_rank=rank,
                dp_size=parts,
                micro_batch_size=micro_batch_size,
                turn=turn,
            )
            for rank in range(parts)
        ]
        assert all(rank.shape == (width // micro_batch_size, micro_batch_size) for rank in ranks)
        held = [sorted(rank.flatten().tolist()) for rank in ranks]
        assert sorted(held) == sorted(sorted(part.tolist()) for part in dealt)
        first = costs[ranks[-turn % parts]].sum()
        assert first == pytest.approx(sums.max())  # the costliest part goes round


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 300),
    shape=st.sampled_from([(1, 1), (6, 1), (6, 2), (6, 3), (6, 6), (16, 4)]),
    begin=st.integers(0, 100),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_steps_hold_alike_packs_of_one_kind(n, shape, begin, share, seed):
    size, replicas = shape
    rng = np.random.default_rng(seed)
    costs, kinds = rng.lognormal(0.0, 1.0, n), rng.random(n) < share
    order = composed(costs, size=size, replicas=replicas, begin=begin, kinds=kinds)
    assert sorted(order.tolist()) == list(range(n))
    head = min(-begin % size, n)
    steps = order[head : n - (n - head) % size].reshape(-1, size)
    whole = [step for step in steps if len(set(kinds[step])) == 1]
    assert len(steps) - len(whole) <= 1
    for kind in (True, False):
        own = [step for step in whole if kinds[step[0]] == kind]
        groups = [g for step in own for g in np.sort(costs[step]).reshape(-1, replicas).tolist()]
        # Groups of a kind do not overlap, but for one around the middle that was taken out.
        overlaps = sum(a[-1] > b[0] for a, b in pairwise(sorted(groups)))
        assert overlaps <= 2


def llava_costs(number: int, seed: int = 0) -> np.ndarray:
    tokens, images = llava_like(number, seed)
    return SampleCost.build(get_recipe("croc_7b/finetune"))(tokens, images)


def test_sixty_four_replicas_wait_for_less_than_three_percent():
    """Four samples a replica: 18 % and more in the drawn order, under 1 % in balanced steps."""
    costs = llava_costs(64 * 256 + 100)
    order = composed(costs, size=256, replicas=64, begin=156)
    assert len(costs) % 256 == 100  # the window completes a step and begins none
    steps = order[100:].reshape(-1, 256)
    drawn = [imbalance(costs[i : i + 256].reshape(64, 4).sum(axis=1)) for i in range(0, 16384, 256)]
    dealt = [imbalance(costs[s][deal(costs[s], 64)].sum(axis=1)) for s in steps]
    assert np.mean(drawn) > 0.18
    assert np.mean(dealt) < 0.01 and max(dealt) < 0.1
    totals = [costs[step].sum() for step in steps]
    assert np.std(totals) < 0.15 * np.mean(totals)  # steps stay mixed: none of long samples alone
    # A run that goes on with half or a quarter of the replicas is balanced as well.
    for replicas in (32, 16):
        dealt = [imbalance(costs[s][deal(costs[s], replicas)].sum(axis=1)) for s in steps]
        assert np.mean(dealt) < 0.01


def test_the_step_shared_by_two_windows_is_balanced():
    """Its packs are those in the middle of either window, so 64 replicas can share them too."""
    first, second = llava_costs(16 * 256 + 77, 1), llava_costs(16 * 256, 2)
    tail = first[composed(first, size=256, replicas=64)[-77:]]
    head = second[composed(second, size=256, replicas=64, begin=77)[: 256 - 77]]
    shared = np.concatenate([tail, head])
    assert np.abs(shared / np.median(first) - 1).max() < 0.1
    assert imbalance(shared[deal(shared, 64)].sum(axis=1)) < 0.03
