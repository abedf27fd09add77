"""Checkpoints of each AdamW load into every other (Transformer Engine's: tests/libraries)."""

import itertools
from pathlib import Path

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from tests.support.synthetic import make_step, tiny_run


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of Transformer Engine's and apex's."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, capturable=False):
        assert adam_w_mode and not capturable
        super().__init__(
            params,
            {
                "lr": lr,
                "bias_correction": True,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            assert group["bias_correction"]
            group["step"] = count = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                assert state.keys() <= {"exp_avg", "exp_avg_sq"}
                mean = state.setdefault("exp_avg", torch.zeros_like(parameter))
                square = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
                if parameter.grad is None:
                    continue
                mean.lerp_(parameter.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                deviation = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1**count))


@pytest.fixture
def use(monkeypatch):
    """Choose the AdamW that megatron finds on the machine."""

    def choose(name: str) -> None:
        monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", name == "torch")
        for module in (megatron_optimizer, distrib_optimizer):
            monkeypatch.setattr(module, "Adam", torch.optim.AdamW if name == "torch" else FusedAdam)

    return choose


def build(run, groups):
    from megatron_croc.training.build import build_training_state

    return build_training_state(run, groups, train_iters=10)


def train(training, until: int) -> None:
    for number in range(training.state.iteration, until):
        batches = make_step(training.run, number, dp_rank=0, dp_size=1)
        training.train_step.train(batches, training.optimizer, training.scheduler)
        training.state.iteration = number + 1


@pytest.mark.parametrize("saved_at", [0, 2])
@pytest.mark.parametrize(("before", "after"), list(itertools.product(("torch", "fused"), repeat=2)))
def test_a_run_goes_on_with_another_adam(
    pg_collection, tmp_path: Path, use, before, after, saved_at
):
    from tests.support.checkpoints import save_checkpoint

    save = str(tmp_path / "checkpoints")
    run = tiny_run(save=save, lr=1e-3, weight_decay=0.1, lr_warmup_fraction=0.0)
    use(before)
    first = build(run, pg_collection)
    train(first, saved_at)
    save_checkpoint(run, first.state, first.chunks, first.optimizer, pg_collection)
    train(first, saved_at + 2)

    run.checkpoint.load = save
    use(after)
    second = build(run, pg_collection)
    assert second.state.iteration == saved_at
    inner = second.optimizer.chained_optimizers[0].optimizer
    assert type(inner).__name__ == ("AdamW" if after == "torch" else "FusedAdam")
    own = {"amsgrad"} if after == "torch" else {"bias_correction"}
    assert all({"amsgrad", "bias_correction"} & group.keys() == own for group in inner.param_groups)
    train(second, saved_at + 2)
    assert {group["step"] for group in inner.param_groups} == {saved_at + 2}
    expected = dict(first.chunks[0].module.named_parameters())
    for name, parameter in second.chunks[0].module.named_parameters():
        # A step moves a weight by about the rate, 1e-3.
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=2e-6, msg=name)


def test_the_kernel_of_an_adam_is_a_choice_of_the_machine(pg_collection, use):
    """One pass on a CPU; a checkpoint neither holds the choice nor changes it."""
    use("torch")
    training = build(tiny_run(), pg_collection)
    (optimizer,) = training.optimizer.chained_optimizers
    groups = optimizer.optimizer.param_groups
    assert all(group["fused"] for group in groups)
    state = optimizer.state_dict()
    saved = state["optimizer"]["param_groups"]
    assert saved and not any({"fused", "foreach"} & group.keys() for group in saved)
    for group in saved:  # as an earlier version wrote it
        group.update(fused=None, foreach=True)
    optimizer.load_state_dict(state)
    assert all(group["fused"] and not group["foreach"] for group in groups)
