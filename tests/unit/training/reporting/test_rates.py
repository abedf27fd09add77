"""Rates and shares of the reporter, by hand: divided by time, devices and peak, once each."""

from pathlib import Path

import pytest

from tests.support.synthetic import tiny_run
from tests.unit.training.reporting.test_metrics import make_metrics, rows_of


@pytest.mark.parametrize(
    ("name", "cores", "per_clock", "clock"),
    [
        # Multiprocessors, dense bf16 operations of one in a clock, boost clock: NVIDIA's
        # architecture white papers.
        ("NVIDIA H100 80GB HBM3", 132, 4096, 1.83e9),
        ("NVIDIA H200", 132, 4096, 1.83e9),
        ("NVIDIA A100-SXM4-80GB", 108, 2048, 1.41e9),
    ],
)
def test_peaks_follow_from_the_devices_clocks(name, cores, per_clock, clock):
    from megatron_croc.planning.gpus import GPUS
    from megatron_croc.training.reporting.reporting import peak_flops

    peak = peak_flops(name)
    assert peak == pytest.approx(cores * per_clock * clock, rel=2e-3)
    assert {gpu.peak for gpu in GPUS.values() if gpu.name[:4].upper() in name} == {peak}


def test_an_unknown_device_has_no_peak():
    from megatron_croc.training.reporting.reporting import peak_flops

    assert peak_flops("cpu") is None and peak_flops("NVIDIA T4") is None


@pytest.mark.parametrize("world_size", [1, 8])
def test_rates_are_of_all_ranks_and_mfu_of_one(world_size, tmp_path: Path, monkeypatch):
    """Metrics are those of the whole job already: only what is said per device is divided."""
    from megatron_croc.training.build import build_reporter
    from megatron_croc.training.reporting import reporting

    run = tiny_run(log_dir=str(tmp_path / "log"), log_interval=2, tensorboard=False)
    monkeypatch.setattr(reporting, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    reporter = build_reporter(run, train_iters=2, world_size=world_size)
    reporter.started, reporter.clock = 0.0, lambda: 10.0
    for number in (1, 2):
        reporter.add_step(number, make_metrics(number, flops=1e15), waited=0.0)
    (row,) = rows_of(tmp_path)
    assert row["tokens_per_second"] == pytest.approx((100 + 200) / 10.0)
    assert row["samples_per_second"] == pytest.approx(16 / 10.0)
    assert row["seconds_per_step"] == pytest.approx(5.0)
    assert row["tflops_per_device"] == pytest.approx(2e15 / 10.0 / world_size / 1e12)
    assert row["mfu"] == pytest.approx(2e15 / 10.0 / world_size / 989e12)
    assert row["world_size"] == world_size


def test_a_refused_step_is_not_counted_as_work(tmp_path: Path):
    from megatron_croc.training.build import build_reporter

    run = tiny_run(log_dir=str(tmp_path / "log"), log_interval=2, tensorboard=False)
    reporter = build_reporter(run, train_iters=2, world_size=2)
    reporter.started, reporter.clock = 0.0, lambda: 10.0
    reporter.add_step(1, make_metrics(1), waited=0.0)
    reporter.add_step(2, make_metrics(2, loss=9e9, is_skipped=True), waited=0.0)
    (row,) = rows_of(tmp_path)
    assert row["loss"] == pytest.approx(5.4) and row["grad_norm"] == 2.0
    assert row["tokens_per_second"] == pytest.approx(100 / 10.0)
    assert row["samples_per_second"] == pytest.approx(8 / 10.0)
    assert row["tflops_per_device"] == pytest.approx(1e9 / 10.0 / 2 / 1e12)
    assert row["seconds_per_step"] == pytest.approx(5.0) and row["skipped_steps"] == 1


def test_packing_fill_is_a_share_of_all_packs(tmp_path: Path):
    from megatron_croc.training.build import build_reporter

    run = tiny_run(log_dir=str(tmp_path / "log"), log_interval=2, tensorboard=False, packing=True)
    reporter = build_reporter(run, train_iters=2, world_size=2)
    for number in (1, 2):
        reporter.add_step(number, make_metrics(number), waited=0.0)
    (row,) = rows_of(tmp_path)
    length = run.data.packing_length or run.data.seq_length
    assert row["packing_fill"] == pytest.approx((100 + 200) / (2 * 8 * length))
