"""Steps that can be dealt to replicas of equal work, and the dealing itself.

    costs of a window  --sort--> strata --cut--> groups of alike packs, one of each stratum a step
    costs of a step    --deal--> replicas --deal--> micro-batches

A pack of twice the mean cost can only be balanced by others as costly, one on each replica. So a
step takes packs in groups of as many as there are replicas, alike within a group. Every stratum
(the cheapest packs of the window, ..., the costliest) gives each step one group, drawn at random:
steps stay mixed, and cost about the same.

Which packs a step holds depends on the number of replicas that it is composed for, never on the
layout. The layout only decides which replica gets which of them.
"""

import heapq

import numpy as np

from megatron_croc.data.order.permutation import Permutation

_MIXED, _STEPS, _STRATA = 1, 2, 3
"""Last words of keys, for independent random numbers. None is 0: a key of (a, b) and one of
(a, b, 0) give the same numbers."""


def compose_steps(
    costs: np.ndarray,
    kinds: np.ndarray,
    *,
    global_batch_size: int,
    replicas: int,
    begin: int,
    key: tuple[int, ...],
) -> np.ndarray:
    """Compute the order of the packs of one window.

    Args:
        costs: float [n], cost of each pack.
        kinds: int [n]; a step holds packs of one kind.
        global_batch_size: packs of one optimizer step.
        replicas: number of replicas to balance for; divides global_batch_size.
        begin: number of packs before this window; gives its offset within a step.
        key: of the random order.

    Returns:
        int64 [n], a permutation. Packs in the two steps shared with the neighbouring windows, and
        in at most one step of mixed kinds, are those in the middle of the costs of their kind.
    """
    size = global_batch_size
    head = min(-begin % size, costs.size)  # packs that complete the previous step
    tail = (costs.size - head) % size
    by_kind = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
    left_over = [len(packs) % size for packs in by_kind]
    if sum(left_over) < head + tail:  # too few for both ends: split one step
        left_over[int(np.argmax([len(packs) for packs in by_kind]))] += size
    steps, mixed = [], []
    for kind, (packs, spare) in enumerate(zip(by_kind, left_over, strict=True)):
        ascending = packs[np.argsort(costs[packs], kind="stable")]
        middle = (packs.size - spare) // 2
        mixed.append(ascending[middle : middle + spare])
        rest = np.delete(ascending, slice(middle, middle + spare))
        steps += list(_stratify(rest, size, replicas, (*key, kind)))
    ends = _shuffled(np.concatenate(mixed), (*key, 0, 0, _MIXED))
    if head + tail < ends.size:
        steps.append(ends[head : ends.size - tail])
    order = _shuffled(np.arange(len(steps)), (*key, 0, 0, _STEPS))
    pieces = [ends[:head], *(steps[i] for i in order), ends[ends.size - tail :]]
    return np.concatenate(pieces).astype(np.int64)


def _stratify(ascending: np.ndarray, size: int, replicas: int, key: tuple[int, ...]) -> np.ndarray:
    """Make whole steps of packs in ascending order of cost: int64 [steps, size]."""
    num_steps = ascending.size // size
    strata = ascending.reshape(size // replicas, num_steps, replicas)
    drawn = [
        groups[_shuffled(np.arange(num_steps), (*key, number, _STRATA))]
        for number, groups in enumerate(strata)
    ]
    return np.stack(drawn, axis=1).reshape(num_steps, size)


def _shuffled(values: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    return values[Permutation(values.size, key)(np.arange(values.size))]


def deal(costs: np.ndarray, parts: int) -> np.ndarray:
    """Deal items to parts of equal number and nearly equal cost.

    Balanced largest differencing (Karmarkar and Karp, "The differencing method of set
    partitioning", 1982; for parts of equal number: Michiels et al., "Performance ratios of the
    differencing method applied to the balanced number partitioning problem", 2003). The items, the
    costliest first, are cut into rounds of one item for every part. The two rounds that differ most
    are added, the largest of one to the smallest of the other, until one is left.

    Args:
        costs: float [n]; n is a multiple of `parts`.
        parts: number of parts.

    Returns:
        int64 [parts, n / parts], items of each part; the costliest part first.
    """
    rounds = np.argsort(-costs, kind="stable").reshape(-1, parts)
    # (minus the difference, number, cost of each part: descending, items of each part)
    waiting = [
        (costs[items[-1]] - costs[items[0]], number, costs[items], items[:, None])
        for number, items in enumerate(rounds)
    ]
    heapq.heapify(waiting)
    number = len(waiting)
    while len(waiting) > 1:
        _, _, sums, items = heapq.heappop(waiting)
        _, _, more_sums, more_items = heapq.heappop(waiting)
        sums = sums + more_sums[::-1]
        items = np.concatenate([items, more_items[::-1]], axis=1)
        order = np.argsort(-sums, kind="stable")
        sums, items = sums[order], items[order]
        heapq.heappush(waiting, (sums[-1] - sums[0], number, sums, items))
        number += 1
    return waiting[0][3]


def deal_micro_batches(
    costs: np.ndarray, *, dp_rank: int, dp_size: int, micro_batch_size: int, turn: int
) -> np.ndarray:
    """Deal the packs of a step to replicas and their micro-batches; return those of one replica.

    Args:
        costs: float [B], cost of each pack of the step.
        dp_rank: the replica.
        dp_size: number of replicas.
        micro_batch_size: packs of a micro-batch.
        turn: number of the step. The costliest part goes to another replica in each step, so that
            none of them is slower in the long run.

    Returns:
        int64 [micro-batches, micro_batch_size], the costliest micro-batch first.
    """
    own = deal(costs, dp_size)[(dp_rank + turn) % dp_size]
    return own[deal(costs[own], own.size // micro_batch_size)]


def imbalance(costs: np.ndarray) -> float:
    """Excess of the largest over the mean: what the others wait for, as a share of their work."""
    mean = float(np.mean(costs))
    return float(np.max(costs)) / mean - 1.0 if mean > 0 else 0.0
