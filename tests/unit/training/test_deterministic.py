"""`deterministic`: its switches are set, and each operation of a stage has a deterministic form."""

import os

import pytest
import torch
from megatron.core.utils import get_model_config

from tests.support.synthetic import make_step, tiny_run

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO")


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    for name in VARIABLES:
        os.environ.pop(name, None)


@pytest.mark.parametrize("stage", ["pretrain_mlp", "pretrain_croc", "finetune"])
def test_a_step_uses_deterministic_operations_only(pg_collection, restored, stage: str):
    from megatron_croc.training.build import build_training_state

    losses = []
    for is_deterministic in (False, True):
        run = tiny_run(stage=stage, deterministic=is_deterministic, freeze_ViT=False)
        training = build_training_state(run, pg_collection, train_iters=2)
        assert torch.are_deterministic_algorithms_enabled() is is_deterministic
        assert get_model_config(training.chunks[0]).deterministic_mode is is_deterministic
        batches = make_step(run, 0, dp_rank=0, dp_size=1)
        metrics = training.train_step.train(batches, training.optimizer, training.scheduler)
        losses.append((metrics.loss, metrics.grad_norm))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


def test_a_choice_of_the_user_stays(restored, monkeypatch: pytest.MonkeyPatch):
    from megatron_croc.parallel.device import require_determinism

    monkeypatch.setenv("NCCL_ALGO", "Tree")
    require_determinism()
    assert os.environ["NCCL_ALGO"] == "Tree"
