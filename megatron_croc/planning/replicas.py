"""Imbalance of replicas when steps are balanced, found by composing and dealing some of them."""

from functools import lru_cache
from statistics import fmean

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.order.balance import compose_steps, deal, imbalance
from megatron_croc.data.order.grouping import GROUPED_WINDOW
from megatron_croc.data.order.packing import pack
from megatron_croc.planning.workload import Workload

_STEPS_DEALT = 16
"""Number of steps of the window that are dealt."""

_PACKED_SAMPLES = 1024
"""Number of samples that are packed, for their costs."""


def balanced_imbalance(run: RunConfig, workload: Workload, replicas: int) -> float:
    """Work of the busiest of `replicas` above their mean, as a share; mean over some steps.

    The steps are those of the order of samples (data/order), for lengths of this distribution.
    """
    assert run.data.balance_replicas is not None
    return _deal_window(
        workload,
        SampleCost.build(run),
        composed_for=run.data.balance_replicas,
        global_batch_size=run.training.global_batch_size,
        replicas=replicas,
        packing_length=run.data.row_length if run.data.packing else None,
    )


@lru_cache(maxsize=1024)
def _deal_window(
    workload: Workload,
    cost: SampleCost,
    *,
    composed_for: int,
    global_batch_size: int,
    replicas: int,
    packing_length: int | None,
) -> float:
    number = GROUPED_WINDOW * global_batch_size
    costs = np.resize(_costs(workload, cost, number, packing_length), number)
    steps = compose_steps(
        costs,
        np.zeros(number, dtype=bool),
        global_batch_size=global_batch_size,
        replicas=composed_for,
        begin=0,
        key=(0,),
    ).reshape(-1, global_batch_size)
    return fmean(
        imbalance(costs[step][deal(costs[step], replicas)].sum(axis=1))
        for step in steps[:_STEPS_DEALT]
    )


def _costs(
    workload: Workload, cost: SampleCost, number: int, packing_length: int | None
) -> np.ndarray:
    """Costs of `number` samples, or of fewer packs."""
    if packing_length is None:
        return cost(workload.draw(number), np.full(number, workload.images))
    tokens = workload.draw(_PACKED_SAMPLES)
    each = cost(tokens, np.full(tokens.size, workload.images))
    packs = pack([min(round(length), packing_length) for length in tokens], packing_length)
    return np.array([each[members].sum() for members in packs])
