"""Tokens and images of the samples of a training step, from a distribution of sample lengths.

It imports no torch: the planner draws the loads of all replicas with it.
"""

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.order.balance import compose_steps, deal_micro_batches
from megatron_croc.data.order.grouping import GROUPED_WINDOW
from megatron_croc.data.order.permutation import BALANCE
from megatron_croc.planning.workload import Workload, from_numbers
from megatron_croc.rehearsal.job import RowKind, Rows

QUESTION = 4
"""Text tokens of a sample without a label."""

Size = tuple[int, int]
"""(tokens, images) of a sample; visual tokens count."""

Loads = list[list[dict[str, float]]]
"""For each replica, for each micro-batch: part of the model -> its work."""


def workload_of(run: RunConfig, rows: Rows) -> Workload:
    """The distribution of sample lengths that rows without data are made from."""
    return from_numbers(
        run, text_tokens=rows.text_tokens, images=rows.images, spread=rows.text_spread
    )


def step_sizes(
    run: RunConfig, kind: RowKind, workload: Workload, *, dp_rank: int, dp_size: int
) -> list[list[Size]]:
    """Sizes of the samples of each micro-batch of a replica's first step, for rows without data."""
    training = run.training
    count = training.global_batch_size // (training.micro_batch_size * dp_size)
    if kind != "drawn":
        return [(_longest if kind == "longest" else _mean)(run, workload)] * count
    if run.data.balance_replicas is None:
        return [_drawn(run, workload, dp_rank, number) for number in range(count)]
    return _dealt(run, *_composed_step(run, workload), dp_rank=dp_rank, dp_size=dp_size)


def drawn_loads(run: RunConfig, workload: Workload, dp_size: int) -> Loads:
    """Work of every replica's micro-batches of drawn samples, balanced as the run is."""
    if run.data.balance_replicas is None:
        steps = [
            step_sizes(run, "drawn", workload, dp_rank=rank, dp_size=dp_size)
            for rank in range(dp_size)
        ]
    else:
        packs, costs = _composed_step(run, workload)
        steps = [
            _dealt(run, packs, costs, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)
        ]
    return [[load_of_samples(sizes) for sizes in step] for step in steps]


def load_of_samples(sizes: list[Size]) -> dict[str, float]:
    """Work of a micro-batch of these samples."""
    return load_of(sum(tokens for tokens, _ in sizes), sum(images for _, images in sizes))


def load_of(tokens: float, images: float) -> dict[str, float]:
    """Work by part of the model: tokens, or images."""
    return {"language_model": tokens, "vision_tower": images, "projector": images}


def _longest(run: RunConfig, workload: Workload) -> list[Size]:
    """Each sample of the largest pack that `croc check` expects."""
    if run.data.packing:
        return _full_packs(run, workload)
    images = round(max(workload.images, 1.0))
    return [(round(workload.peak_tokens), images)] * run.training.micro_batch_size


def _mean(run: RunConfig, workload: Workload) -> list[Size]:
    """Samples of mean length; their images add up to the mean, and are not less than one."""
    if run.data.packing:
        return _full_packs(run, workload)
    count, span = run.training.micro_batch_size, run.model.vision_tower.num_visual_tokens
    images = max(round(count * workload.images), 1 if workload.images else 0)
    text = workload.mean - workload.images * span
    shares = [(n + 1) * images // count - n * images // count for n in range(count)]
    return [(max(round(text + share * span), QUESTION + 1), share) for share in shares]


def _full_packs(run: RunConfig, workload: Workload) -> list[Size]:
    images = round(workload.images)
    size = max(round(workload.mean), 1)
    pack = [(size, images)] * (run.data.row_length // size)
    if rest := run.data.row_length - size * len(pack):
        pack.append((rest, 0))
    return pack * run.training.micro_batch_size


def _drawn(run: RunConfig, workload: Workload, dp_rank: int, number: int) -> list[Size]:
    """Samples of a micro-batch of a replica, drawn by the run's seed."""
    rng = np.random.default_rng((run.training.seed, dp_rank, number, 1))
    return [
        size
        for _ in range(run.training.micro_batch_size)
        for size in _drawn_pack(run, workload, rng)
    ]


def _drawn_pack(run: RunConfig, workload: Workload, rng: np.random.Generator) -> list[Size]:
    """One sample; with packing as many as fit before the first that does not."""

    def draw() -> Size:
        images = int(workload.images + rng.random())
        visual = (images - workload.images) * run.model.vision_tower.num_visual_tokens
        length = round(workload.lengths[rng.integers(len(workload.lengths))] + visual)
        return max(length, QUESTION + 1), images

    pack = [draw()]
    room = run.data.row_length - pack[0][0]
    while run.data.packing and room >= (size := draw())[0]:
        pack.append(size)
        room -= size[0]
    return pack


def _composed_step(run: RunConfig, workload: Workload) -> tuple[list[list[Size]], np.ndarray]:
    """Packs of the first step and their costs, float64 [B]: composed as the order of samples is."""
    size, replicas = run.training.global_batch_size, run.data.balance_replicas
    assert replicas is not None
    rng, cost = np.random.default_rng((run.training.seed, 2)), SampleCost.build(run)
    packs = [_drawn_pack(run, workload, rng) for _ in range(GROUPED_WINDOW * size)]
    counts = [len(pack) for pack in packs]
    tokens, images = np.array([sample for pack in packs for sample in pack], dtype=float).T
    costs = np.add.reduceat(cost(tokens, images), np.cumsum([0, *counts[:-1]]))
    step = compose_steps(
        costs,
        np.zeros(len(packs), dtype=bool),
        global_batch_size=size,
        replicas=replicas,
        begin=0,
        key=(BALANCE, run.training.seed, 0),
    )[:size]
    return [packs[i] for i in step], costs[step]


def _dealt(
    run: RunConfig, packs: list[list[Size]], costs: np.ndarray, *, dp_rank: int, dp_size: int
) -> list[list[Size]]:
    """Samples of each micro-batch that a composed step deals to a replica."""
    own = deal_micro_batches(
        costs,
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=run.training.micro_batch_size,
        turn=0,
    )
    return [[size for i in members for size in packs[i]] for members in own.tolist()]
