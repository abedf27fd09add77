"""Slow ranks among made-up times, and the metrics computed from the times."""

import json

import pytest

from megatron_croc.training.reporting.stragglers import (
    Place,
    RankTimes,
    find_stragglers,
    stragglers_line,
)


def times(compute: list[float], waits: list[float] | None = None) -> list[RankTimes]:
    waits = waits or [0.0] * len(compute)
    return [
        RankTimes(step=2.0, compute=c, data_wait=w) for c, w in zip(compute, waits, strict=True)
    ]


def places(stages: list[int]) -> list[Place]:
    return [Place(host=f"node{rank // 2}", stage=stage) for rank, stage in enumerate(stages)]


def test_a_rank_is_compared_with_its_own_stage():
    # Stage 0 has the vision tower: twice the work of stage 1, and nobody's fault.
    compute, stages = [1.0, 1.0, 1.5, 0.5, 0.5, 0.5], [0, 0, 0, 1, 1, 1]
    (slow,) = find_stragglers(times(compute), places(stages), percent=30.0)
    assert (slow.rank, slow.host, slow.cause) == (2, "node1", "compute")
    assert slow.percent == pytest.approx(50.0)
    assert str(slow) == "rank 2 on node1 computes 50 % longer than the median of its stage"
    assert find_stragglers(times(compute), places(stages), percent=51.0) == []


def test_a_rank_alone_in_its_stage_has_no_peers():
    assert find_stragglers(times([1.0, 9.0]), places([0, 1]), percent=10.0) == []


def test_waiting_for_data_is_a_share_of_the_step():
    waiting = times([1.0] * 4, [0.1, 0.9, 0.1, 0.1])
    (slow,) = find_stragglers(waiting, places([0] * 4), percent=30.0)
    assert (slow.rank, slow.cause, slow.percent) == (1, "data", pytest.approx(40.0))
    assert "waits for data 40 % of the step longer" in str(slow)


def test_the_slowest_comes_first_and_no_time_at_all_is_no_fault():
    slow = find_stragglers(times([1.0, 1.0, 1.0, 2.0, 3.0]), places([0] * 5), percent=30.0)
    assert [straggler.rank for straggler in slow] == [4, 3]
    nothing = [RankTimes(step=0.0, compute=0.0, data_wait=0.0)] * 2
    assert find_stragglers(nothing, places([0, 0]), percent=1.0) == []


def test_an_interval_is_a_line():
    numbers = times([1.0, 1.0, 2.0])
    slow = find_stragglers(numbers, places([0] * 3), percent=30.0)
    first = json.loads(stragglers_line(20, numbers, slow))
    second = json.loads(stragglers_line(30, times([1.0] * 3), []))
    assert first == {
        "iteration": 20,
        "step_seconds": [2.0] * 3,
        "compute_seconds": [1.0, 1.0, 2.0],
        "data_wait_seconds": [0.0] * 3,
        "slow": [{"rank": 2, "host": "node1", "cause": "compute", "percent": 100.0}],
    }
    assert second["iteration"] == 30 and second["slow"] == []


def test_columns_are_means_and_maxima_over_ranks():
    from megatron_croc.parallel.stopwatch import REGIONS
    from megatron_croc.training.reporting.time_split import IntervalTimes

    def rank(**seconds: float) -> dict[str, float]:
        return {**dict.fromkeys(REGIONS, 0.0), **seconds}

    first = rank(vision=2.0, forward=4.0, backward=8.0, data_wait=1.0, checkpoint=4.0, other=1.0)
    second = rank(forward=5.0, backward=5.0, pipeline_wait=9.0, validation=1.0)
    interval = IntervalTimes(ranks=[first, second], num_steps=5)
    row = interval.row()
    assert row["interval_seconds"] == 20.0
    assert row["time_share/forward"] == pytest.approx((4 / 20 + 5 / 20) / 2)
    assert row["time_share_max/forward"] == pytest.approx(5 / 20)
    assert row["checkpoint_seconds"] == 4.0 and row["validation_seconds"] == 1.0
    assert "time_share/matching" not in row  # a stage without one
    shares = [value for name, value in row.items() if name.startswith("time_share/")]
    assert sum(shares) == pytest.approx(1.0)
    ranks = interval.rank_times()
    # Neither checkpoint nor validation is part of a step; waiting is no work.
    assert ranks[0] == RankTimes(step=16.0 / 5, compute=14.0 / 5, data_wait=1.0 / 5)
    assert ranks[1] == RankTimes(step=19.0 / 5, compute=10.0 / 5, data_wait=0.0)
    assert "imbalance_seen" not in row  # one replica


def test_imbalance_is_compared_step_by_step_inside_each_stage():
    """Two replicas of two stages: the slow one changes, which their sums would hide."""
    from megatron_croc.parallel.stopwatch import REGIONS
    from megatron_croc.training.reporting.time_split import IntervalTimes

    seconds = [[3.0, 1.0], [5.0, 5.0], [1.0, 3.0], [5.0, 5.0]]
    interval = IntervalTimes(
        ranks=[{**dict.fromkeys(REGIONS, 0.0), "forward": 4.0}] * 4,
        num_steps=2,
        step_compute=seconds,
        stages=[0, 1, 0, 1],
    )
    assert interval.row()["imbalance_seen"] == pytest.approx(3 / 2 - 1)
