"""Any cut of the model or the batch gives the single process's losses, gradients and weights."""

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.synthetic import make_step, tiny_run

MIXED = (1, 0, 2, 1, 3, 0, 1, 1)
"""Images per sample: single, several, none."""


def train_few_steps(stage: str, changes: dict, images: tuple[int, ...], steps: int) -> list[dict]:
    """Train on made-up samples; every step's metrics as a dict (runs on each rank)."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_trainer

    run = tiny_run(stage, **changes)
    pg = start_distributed(run.parallel, seed=run.training.seed)
    trainer = build_trainer(run, pg, train_iters=10)
    rows = []
    for step in range(steps):
        batches = make_step(run, step, dp_rank=pg.dp.rank(), dp_size=pg.dp.size(), images=images)
        metrics = trainer.stepper.train(batches, trainer.optimizer, trainer.scheduler)
        rows.append(
            {
                "text": metrics.text_loss,
                "reconstruction": metrics.reconstruction_loss or 0.0,
                "grad_norm": metrics.grad_norm,
                "num_tokens": metrics.num_tokens,
                "pool_usage": metrics.pool_usage or 0.0,
                "matched_distance": metrics.matched_distance or 0.0,
            }
        )
    return rows


LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "tp2+sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "dp2": (2, {}),
    "cp2": (2, dict(context_parallel_size=2)),
    "pp2+vpp2": (
        2,
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["pretrain_mlp", "pretrain_croc", "finetune"])
def test_losses_do_not_depend_on_the_layout(stage: str) -> None:
    (alone,) = run_distributed(train_few_steps, 1, stage, {}, MIXED, 3)
    for name, (world_size, changes) in LAYOUTS.items():
        for rows in run_distributed(train_few_steps, world_size, stage, changes, MIXED, 3):
            for step, (row, reference) in enumerate(zip(rows, alone, strict=True)):
                for key, value in reference.items():
                    assert row[key] == pytest.approx(value, rel=2e-5, abs=1e-9), (name, step, key)
    assert torch.tensor(alone[0]["text"]).isfinite()
