#!/usr/bin/env python
"""Waiting of replicas for each other, with steps as drawn and with balanced steps.

    python benchmarks/balance.py           # predicted, for Croc-7B; and what planning costs
    python benchmarks/balance.py --gloo    # measured: tiny model, 4 replicas on this machine

Lengths are made up in the shape of LLaVA-1.5's (data/synthetic.py::llava_like). The measurement
trains the tiny model on such samples, a fourth as long. Its times are CPU seconds of each process's
main thread in forward and backward pass, so that neither waiting for others nor a machine that has
fewer cores than replicas enters. Steps of both kinds alternate. Imbalance is max / mean - 1 over
the replicas of a step.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.order.balance import compose_steps, deal, imbalance
from megatron_croc.data.order.row_plan import RowPlan, Slot
from megatron_croc.data.synthetic import llava_like, make_batch
from megatron_croc.recipes import get_recipe

REPLICAS, STEPS, REPEATS = 4, 12, 3
SHORTER = 4
"""Factor by which texts are shortened for the tiny model."""


def predict() -> None:
    """Print the imbalance of drawn, dealt and balanced steps of Croc-7B at 64 replicas."""
    cost = SampleCost.build(get_recipe("croc_7b/finetune"))
    print(f"{cost}\n")
    print("samples a step | replicas | as drawn | dealt | composed for 64 and dealt: mean, largest")
    for size, replicas in ((128, 64), (256, 64), (512, 64), (256, 32), (256, 16)):
        costs = cost(*llava_like(64 * size))
        drawn = costs.reshape(64, replicas, -1).sum(axis=2)
        dealt = [deal_loads(step, replicas) for step in costs.reshape(64, size)]
        order = composed(costs, size, 64)
        balanced = [imbalance(deal_loads(costs[s], replicas)) for s in order.reshape(64, size)]
        print(
            f"{size:>14} | {replicas:>8} | {np.mean([imbalance(step) for step in drawn]):>8.1%} | "
            f"{np.mean([imbalance(loads) for loads in dealt]):>5.1%} | "
            f"{np.mean(balanced):.2%}, {max(balanced):.1%}"
        )
    size, number = 1024, 1024 * 1024
    costs = cost(*llava_like(number))
    begun = time.process_time()
    for first in range(0, number, 64 * size):
        window = costs[first : first + 64 * size]
        for step in composed(window, size, 64).reshape(-1, size):
            deal(window[step], 64)
    print(f"\n{number:,} samples composed and dealt in {time.process_time() - begun:.1f} CPU s")


def composed(costs: np.ndarray, size: int, replicas: int) -> np.ndarray:
    """Order of a window of whole steps."""
    return compose_steps(
        costs,
        np.zeros(costs.size, dtype=bool),
        global_batch_size=size,
        replicas=replicas,
        begin=0,
        key=(1,),
    )


def deal_loads(costs: np.ndarray, replicas: int) -> np.ndarray:
    """Cost of each replica of a dealt step."""
    return costs[deal(costs, replicas)].sum(axis=1)


def tiny() -> RunConfig:
    """A tiny run whose packs hold two samples of at most 512 tokens."""
    run = get_recipe("tiny/finetune")
    run.training.micro_batch_size, run.training.global_batch_size = 2, 8 * REPLICAS
    run.data.num_workers = 0
    return run


def tokens_of(run: RunConfig, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and images of samples of the measurement."""
    tokens, images = llava_like(8192)
    text = np.maximum((tokens - 576 * images) // SHORTER, 4)
    return (text + images * run.model.vision_tower.num_visual_tokens)[index], images[index]


class Builder:
    """Makes up the samples of slots with the lengths they were planned with."""

    num_samples = 8192

    def __init__(self, run: RunConfig) -> None:
        """Args: run: sizes of the model."""
        self.run = run

    def build(self, slots: Sequence[Slot]) -> tuple:
        """Batch of the slots' samples."""
        return make_batch(self.run, [self._sample(slot.index) for slot in slots]), []

    def _sample(self, number: int):
        import torch

        from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
        from megatron_croc.data.sample.collate import ReadySample, expand_sample
        from megatron_croc.data.sample.tokenization import TokenizedSample

        span = self.run.model.vision_tower.num_visual_tokens
        (length,), (images,) = (n.tolist() for n in tokens_of(self.run, np.array([number])))
        rng, text = np.random.default_rng(number), length - images * span
        words = rng.integers(1, self.run.model.language_model.vocab_size, text)
        tokens = TokenizedSample(
            sample_id=f"made-up-{number}",
            input_ids=np.concatenate([np.full(images, IMAGE_TOKEN_INDEX), words]),
            labels=np.concatenate([np.full(images + 1, IGNORE_INDEX), words[1:]]),
        )
        size = self.run.model.vision_tower.img_size
        pixels = torch.zeros((3, size, size), dtype=torch.uint8)
        expanded = expand_sample(
            tokens, num_visual_tokens=span, seq_length=self.run.data.seq_length
        )
        return ReadySample(tokens=expanded, epoch=0, pixel_values=[pixels] * images)


def plan_of(run: RunConfig, replicas: int | None) -> RowPlan:
    """Plan of the made-up samples; None: as drawn."""
    from megatron_croc.data.order.batching import balanced, separate
    from megatron_croc.data.order.blend import Blend, Source

    source = Source(name="made up", folders=(), num_samples=8192, weight=Fraction(1))
    arrangement = separate()
    if replicas is not None:
        arrangement = balanced(
            arrangement,
            lambda index: tokens_of(run, index),
            cost=SampleCost.build(run),
            replicas=replicas,
            global_batch_size=run.training.global_batch_size,
            seed=1,
        )
    return RowPlan(Blend(sources=(source,), epoch_length=8192), arrangement, seed=1)


def work(folder: Path) -> None:
    """On each rank: CPU seconds of every step, as drawn and balanced."""
    import torch.distributed as dist

    from megatron_croc.data.loader import MicroBatchLoader
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_training_state

    run = tiny()
    pg = start_distributed(run.parallel, seed=1)
    training = build_training_state(run, pg, train_iters=1000)
    loaders = {
        name: MicroBatchLoader(
            builder=Builder(run),  # type: ignore[arg-type]
            plan=plan_of(run, replicas),
            data=run.data,
            training=run.training,
            state=None,
            dp_rank=pg.dp.rank(),
            dp_size=pg.dp.size(),
        )
        for name, replicas in (("as drawn", None), ("balanced", REPLICAS))
    }
    rows = {name: [] for name in loaders}
    for step in range(STEPS + 1):
        for name, batches in loaders.items():
            measured = measure(training, batches)
            rows[name] += [measured] if step else []  # the first one warms up
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    if dist.get_rank() == 0:
        (folder / "balance_ranks.json").write_text(json.dumps(gathered))


def measure(training, batches) -> tuple[float, float]:
    """Operations and CPU seconds (median of some passes) of this rank in one step."""
    from megatron_croc.costs.flops import count_flops

    training_config = training.train_step.run.training
    count = training_config.global_batch_size // training_config.micro_batch_size // REPLICAS
    own = [next(batches) for _ in range(count)]
    seconds = []
    for _ in range(REPEATS):
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        begun = time.thread_time()
        totals = training.train_step.forward_backward(own)
        seconds.append(time.thread_time() - begun)
    flops = sum(count_flops(training.train_step.run, totals.work).values())
    return flops, float(np.median(seconds))


def report(ranks: list[dict[str, list]], out: Path) -> None:
    """Print and keep predicted and seen imbalance."""
    result = {"command": "python benchmarks/balance.py --gloo", "cores": os.cpu_count()}
    print(f"tiny model, {REPLICAS} replicas on gloo, {STEPS} steps; imbalance: mean, largest")
    for name in ranks[0]:
        numbers = np.array([rank[name] for rank in ranks])  # [replicas, steps, 2]
        rows = {
            kind: [imbalance(step) for step in numbers[:, :, column].T]
            for column, kind in enumerate(("predicted", "seen"))
        }
        result[name] = dict(rows)
        texts = [f"{k} {np.mean(v):.1%}, {max(v):.1%}" for k, v in rows.items()]
        print(f"{name:<9} {'   '.join(texts)}")
        rate = numbers[:, :, 0].sum() / numbers[:, :, 1].max(axis=0).sum() / REPLICAS
        result[name] |= {"gflops_per_second": rate / 1e9, "operations_seconds": numbers.tolist()}
        print(f"          {rate / 1e9:.2f} GFLOP/s a replica, by the slowest of each step")
    (out / "balance.json").write_text(json.dumps(result) + "\n")


def main() -> None:
    """Predict, or launch the replicas and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gloo", action="store_true", help="measure with four processes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", action="store_true", help="set by this script")
    options = parser.parse_args()
    if options.worker:
        work(options.out)
        return
    if not options.gloo:
        predict()
        return
    options.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(REPLICAS), __file__, "--worker", "--out", str(options.out)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    raw = options.out / "balance_ranks.json"
    ranks = json.loads(raw.read_text())
    raw.unlink()
    report(ranks, options.out)


if __name__ == "__main__":
    main()
