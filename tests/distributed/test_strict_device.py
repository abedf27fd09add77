"""Training under CUDA's and NCCL's manners: right numbers, no faults, few waits for the device."""

from collections import Counter
from typing import Any

import pytest
import torch

from megatron_croc.data.synthetic import MIXED_IMAGES
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.training.build import build_training_state
from megatron_croc.verification.layouts.compare import BOUNDS, compare, row
from megatron_croc.verification.layouts.layout import Layout
from megatron_croc.verification.layouts.observe import Observation, assemble, observe
from tests.distributed.test_layouts import STEPS, run_layout
from tests.support.distributed import run_distributed
from tests.support.strict_device import Options, Report, install, run_strict
from tests.support.synthetic import make_step, tiny_run

pytestmark = pytest.mark.distributed

STAGE = "pretrain_croc"
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def alone() -> Observation:
    return run_layout("tp1", STAGE, {})[1]


def restore(fault: str) -> None:
    """The product as it was with a fault."""
    from megatron_croc.parallel import device, pipeline, target_channel

    if fault == "the channel's ends do not meet":
        target_channel.TargetChannel._connect = lambda self: None  # type: ignore[method-assign]
    elif fault == "stages wait for the device":
        communicate = pipeline.PipelineCommunicator._communicate

        def waiting(self: Any, **arguments: Any) -> Any:
            torch.cuda.synchronize()
            return communicate(self, **arguments)

        pipeline.PipelineCommunicator._communicate = waiting  # type: ignore[method-assign]
    elif fault == "sent memory is freed":
        pipeline._HeldSend = lambda work, memory: work  # type: ignore[misc,assignment]
    elif fault == "the search does not wait for its copy":
        device.SideWork.wait_on_host = lambda self: None  # type: ignore[method-assign]
    elif fault == "the main stream does not wait for the side":
        device.SideWork.wait_on_device = lambda self: None  # type: ignore[method-assign]
    else:
        assert not fault


def observe_restored(fault: str, changes: dict, name: str) -> Any:
    restore(fault)
    return observe(Layout.parse(name).apply(tiny_run(STAGE, **changes)), STEPS)


def run_strictly(
    name: str, changes: dict, options: Options, fault: str = ""
) -> tuple[Observation, list[Report]]:
    size = Layout.parse(name).world_size
    ranks = run_distributed(run_strict, size, options, observe_restored, fault, changes, name)
    return assemble([rank for rank, _ in ranks]), [report for _, report in ranks]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("pp2", {}), ("pp2+vpp2", {}), ("tp2+sp", {}), ("cp2", {}), ("dp2", OVERLAP)],
    ids=["pp2", "pp2+vpp2", "tp2+sp", "cp2", "dp2-overlap"],
)
def test_a_layout_gives_the_single_processs_numbers(
    name: str, changes: dict, alone: Observation
) -> None:
    ours, reports = run_strictly(name, changes, Options())
    difference = compare(name, ours, alone)
    assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])
    for report in reports:
        assert report.faults == []
        assert report.num_collectives > 0
        assert report.num_sends > 0 or "pp" not in name
        assert not report.synchronizes


@pytest.mark.parametrize(
    ("fault", "name", "changes", "message"),
    [
        (
            "the channel's ends do not meet",
            "pp2",
            {},
            r"rank \d .* is the first use of the communicator of ranks \[0, 1\] and blocks the "
            r"host until ranks \[\d\] use it too; waited 3 s; rank \d: ",
        ),
        (
            "stages wait for the device",
            "pp2",
            {},
            r"torch.cuda.synchronize at .* with an open send to rank 1 of \[\d+, 16, 64\] float32 "
            ".* target_channel.py.* waited 3 s; rank 1: receive from rank 0|"
            "receive from rank 0 .* waited 3 s; rank 0: torch.cuda.synchronize at .* open send",
        ),
        (
            "the search does not wait for its copy",
            "tp1",
            {},
            r"solve.py:\d+ reads before it is there: copy to the host of \[\d+, 12, 32\] float32",
        ),
        (
            "the main stream does not wait for the side",
            "tp1",
            {"assign_mode": "nearest"},  # a search in a thread is waited for by the host anyway
            r"matching.py:\d+ reads \[.*\] float32, which a side stream computes at .*, without",
        ),
    ],
    ids=["rendezvous", "synchronize", "copy", "side stream"],
)
def test_a_planted_fault_is_named(fault: str, name: str, changes: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_strictly(name, changes, Options(wait_s=3), fault)


def core_frees_open_sends() -> bool:
    from megatron.core import __version__

    return tuple(map(int, __version__.split(".")[:2])) < (0, 18)


@pytest.mark.skipif(not core_frees_open_sends(), reason="megatron-core waits before it frees")
def test_memory_freed_while_it_is_sent_is_named_and_gives_wrong_numbers(
    alone: Observation,
) -> None:
    options = Options(raise_faults=False)
    ours, reports = run_strictly("pp2+vpp2", {}, options, "sent memory is freed")
    assert compare("pp2+vpp2", ours, alone).failures(BOUNDS["fp32"])
    faults = [fault for report in reports for fault in report.faults]
    assert any("memory freed before wait(): send to rank" in fault for fault in faults)
    with pytest.raises(
        AssertionError, match=r"memory freed before wait\(\): send to rank \d of \["
    ):
        run_strictly("pp2+vpp2", {}, Options(), "sent memory is freed")


HOST_READS = {
    # Forward: the search on the CPU, which a GPU does not run.
    "cpu at megatron_croc/ops/assignment/solve.py _solve_on_host": 1,
    # Step: the norm of the gradient, and all metrics at once.
    "item at megatron/core/optimizer/clip_grads.py get_grad_norm_fp32": 1,
    "tolist at megatron_croc/training/reporting/metrics.py reduce": 1,
}
"""Number and places of device syncs in one training step."""


def read_in_a_step(options: Options) -> Counter[str]:
    run = tiny_run(STAGE)
    with install(options) as job:
        pg = start_distributed(run.parallel, seed=1)
        training = build_training_state(run, pg, train_iters=2)
        batches = make_step(run, 0, dp_rank=0, dp_size=1, images=MIXED_IMAGES)
        job.report.host_reads.clear()
        training.train_step.train(batches, training.optimizer, training.scheduler)
    return job.report.host_reads


def test_the_host_waits_for_the_device_in_known_places_only() -> None:
    assert run_distributed(read_in_a_step, 1, Options())[0] == HOST_READS
