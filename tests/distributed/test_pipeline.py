"""Messages between pipeline stages: their memory, their shapes, and what is not waited for."""

import time
from typing import Any

import pytest
import torch

from megatron_croc.config.run import RunConfig
from megatron_croc.data.synthetic import MIXED_IMAGES
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.parallel.target_channel import TargetChannel
from megatron_croc.training.build import build_training_state
from megatron_croc.verification.layouts.layout import Layout
from megatron_croc.verification.layouts.observe import observe
from tests.support.distributed import run_distributed
from tests.support.pipeline_sends import watched_sends
from tests.support.synthetic import make_step, tiny_run

EIGHT_MICRO_BATCHES = {"micro_batch_size": 1}

PIPELINES = [("pp2", 4), ("pp2+vpp2", 4), ("pp4+vpp2", 8)]
"""Layout and layers."""


def prepare(name: str, layers: int) -> RunConfig:
    changes = {"num_layers": layers, **EIGHT_MICRO_BATCHES}
    return Layout.parse(name).apply(tiny_run("pretrain_croc", **changes))


def watch_memory(name: str, layers: int) -> list[bool]:
    with watched_sends() as lost:
        observe(prepare(name, layers), 1)
    return lost


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "layers"), PIPELINES[1:])
def test_no_send_loses_its_memory_before_it_is_waited_for(name: str, layers: int) -> None:
    ranks = run_distributed(watch_memory, Layout.parse(name).world_size, name, layers)
    assert all(len(lost) > 0 for lost in ranks)
    assert not any(map(any, ranks)), [f"{sum(lost)} of {len(lost)}" for lost in ranks]


def count_waits(name: str, layers: int) -> dict[str, int]:
    """Waits for the device and shape messages of one training step."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    counts = {"synchronize": 0, "shapes": 0}

    def counted(what: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return real(*args, **kwargs)

        return call

    torch.cuda.synchronize = counted("synchronize", torch.cuda.synchronize)
    P2PCommunicator._communicate_shapes = counted("shapes", P2PCommunicator._communicate_shapes)
    observe(prepare(name, layers), 1)
    return counts


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "layers"), PIPELINES[:2])
def test_stages_neither_wait_for_the_device_nor_ask_for_shapes(name: str, layers: int) -> None:
    for counts in run_distributed(count_waits, 2, name, layers):
        assert counts == {"synchronize": 0, "shapes": 0}


def open_channel(delay: float) -> float:
    """Seconds until the channel's first send has been handed over."""
    run = tiny_run("pretrain_croc", pipeline_model_parallel_size=2)
    pg = start_distributed(run.parallel, seed=1)
    met: list[int] = []
    for function in ("send", "recv"):
        real = getattr(torch.distributed, function)

        def noted(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            met.append(1)
            return _real(*args, **kwargs)

        setattr(torch.distributed, function, noted)
    started = time.perf_counter()
    if pg.pp.rank() == 1:
        time.sleep(delay)
    TargetChannel(pp=pg.pp, ends=pg.embd)
    assert met == [1]
    return time.perf_counter() - started


@pytest.mark.distributed
def test_the_ends_of_the_target_channel_meet_when_it_is_opened() -> None:
    run_distributed(open_channel, 2, 0.1)


def validate(name: str, changes: dict, images: tuple[int, ...]) -> list[tuple[float, float]]:
    """Losses of two global batches without a backward pass, then of one that trains."""
    run = Layout.parse(name).apply(tiny_run("pretrain_croc", num_layers=4, **changes))
    pg = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, pg, train_iters=2)
    steps = [make_step(run, k, dp_rank=0, dp_size=1, images=images) for k in range(3)]
    seen = [training.train_step.evaluate(step) for step in steps[:2]]
    seen.append(training.train_step.train(steps[2], training.optimizer, training.scheduler))
    return [(metrics.text_loss, metrics.reconstruction_loss or 0.0) for metrics in seen]


UNEVEN = {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3}
TEXT_ALONE = (0,) * len(MIXED_IMAGES)


@pytest.mark.distributed
@pytest.mark.parametrize("images", [MIXED_IMAGES, TEXT_ALONE], ids=["mixed", "text"])
def test_validation_between_training_steps(images: tuple[int, ...]) -> None:
    alone = run_distributed(validate, 1, "tp1", EIGHT_MICRO_BATCHES, images)[0]
    for name, changes in [("pp2", {}), ("pp2", UNEVEN), ("pp2+vpp2", {}), ("tp2+sp+pp2", {})]:
        world_size = Layout.parse(name).world_size
        changes = changes | EIGHT_MICRO_BATCHES
        for losses in run_distributed(validate, world_size, name, changes, images):
            assert losses == [pytest.approx(loss, rel=2e-6) for loss in alone], name
