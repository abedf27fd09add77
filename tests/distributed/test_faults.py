"""Behaviour of runs under injected faults."""

import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch

from megatron_croc.verification.faults.inject import Fault
from megatron_croc.verification.faults.launch import Exit, run_to_exit
from megatron_croc.verification.faults.runs import (
    curve,
    effective_samples,
    faulty_train,
    make_data,
    trace_fault,
    train_words,
)
from tests.support.distributed import run_distributed
from tests.support.synthetic import make_step, tiny_run

pytestmark = pytest.mark.distributed

GRADIENTS = "summing gradients"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory) -> Path:
    """Run without a fault."""
    save = tmp_path_factory.mktemp("unbroken")
    run(data, save)
    assert [row["iteration"] for row in curve(save)] == [1, 2, 3, 4, 5, 6]
    return save


def run(data: Path, save: Path, *faults: Fault, more: tuple[str, ...] = ()) -> list[Exit]:
    """Train on two ranks; without a fault both must exit with status 0."""
    everything = [*faults, trace_fault(save / "trace")]
    exits = run_to_exit(faulty_train, 2, everything, train_words(data, save, *more))
    if not faults:
        assert [e.status for e in exits] == [0, 0], exits[0].output + exits[1].output
    return exits


def latest(save: Path) -> int:
    return int((save / "latest_checkpointed_iteration.txt").read_text())


@pytest.mark.parametrize("ranks", [(1,), (0, 1)], ids=["one rank", "all ranks"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    data: Path, unbroken: Path, tmp_path: Path, ranks: tuple[int, ...]
):
    kills = [
        Fault(fault="kill", rank=rank, iteration=4, micro_batch=1, phase="backward")
        for rank in ranks
    ]
    exits = run(data, tmp_path, *kills)
    assert all(exits[rank].status == -signal.SIGKILL for rank in ranks)
    if 0 not in ranks:
        assert exits[0].status == 1
        assert "rank 1" in exits[0].output and "is gone" in exits[0].output
        assert "step 4, backward, micro-batch 1" in exits[0].output
        assert f"stopped at step 4, {GRADIENTS}" in exits[0].output
        assert "(collective gloo:" in exits[0].output  # torch's flight recorder
    assert [row["iteration"] for row in curve(tmp_path)] == [1, 2, 3]
    run(data, tmp_path)
    assert curve(tmp_path) == curve(unbroken)  # every digit
    (superseded,) = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert json.loads(superseded)["iteration"] == 3
    samples = effective_samples(tmp_path / "trace")
    assert samples == effective_samples(unbroken / "trace")
    everyone = [sample for step in samples.values() for sample in step]
    assert len(everyone) == len(set(everyone)) == 24


def test_signals_and_limits_end_a_run_with_a_checkpoint(data: Path, unbroken: Path, tmp_path: Path):
    ctrl_c = Fault(fault="signal", rank=1, iteration=2, number=signal.SIGINT)
    for iteration, fault, more, said in (
        (1, Fault(fault="signal", rank=1, iteration=1, number=signal.SIGUSR1), (), "SIGUSR1"),
        (2, ctrl_c, (), "SIGINT"),
        (
            3,
            Fault(fault="signal", iteration=3, number=signal.SIGTERM, phase=GRADIENTS),
            (),
            "SIGTERM",
        ),
        (4, None, ("--exit-duration-in-mins=1e-9",), "exit_duration_in_mins"),
        (5, None, ("--exit-interval=5",), "exit_interval"),
    ):
        exits = run(data, tmp_path, *([fault] if fault else []), more=more)
        assert {e.status for e in exits} == {130 if fault is ctrl_c else 0}, exits
        assert f"stopping after step {iteration}: {said}" in exits[0].output
        assert not any("Traceback" in e.output for e in exits)
        assert latest(tmp_path) == iteration
    run(data, tmp_path)
    assert curve(tmp_path) == curve(unbroken)
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


@pytest.mark.parametrize("kind", ["hang", "hang_in_c"])
def test_a_rank_that_hangs_ends_all_and_is_named(data: Path, tmp_path: Path, kind: str):
    """`hang_in_c` keeps the GIL: no Python of that rank can run, not even its watchdog."""
    hang = Fault(fault=kind, rank=1, iteration=2, micro_batch=1)
    exits = run(data, tmp_path, hang, more=("--stall-timeout-minutes=0.05",))
    assert [e.status for e in exits] == [1, 1]
    # Whether rank 1 has ended itself a moment before rank 0 looks is a race.
    assert re.search(
        r"rank 1 \(.*(has not moved|is gone).* (stands|stood) at step 2, forward, micro-batch 1",
        exits[0].output,
    )
    stack = tmp_path / "heartbeats" / "rank_00001.stack"
    assert str(stack) in exits[0].output
    assert "_strike" in stack.read_text()  # the very function that hangs


def test_an_error_of_one_rank_is_told_as_it_is(data: Path, tmp_path: Path):
    exits = run(data, tmp_path, Fault(fault="raise", rank=1, iteration=2, phase="backward"))
    assert all(e.status != 0 for e in exits)
    assert "a made-up error of the device" in exits[1].output
    assert "rank 1" in exits[0].output and "step 2, backward" in exits[0].output


def test_a_bad_step_is_skipped_reported_and_after_too_many_the_run_stops(
    data: Path, unbroken: Path, tmp_path: Path
):
    faults = [
        Fault(fault="nan_loss", rank=0, iteration=2, micro_batch=1),
        Fault(fault="nan_gradient", rank=1, iteration=4),
        Fault(fault="spike", rank=1, iteration=5),
        Fault(fault="nan_gradient", rank=0, iteration=6),
    ]
    more = ("--max-consecutive-skips=1",)
    exits = run(data, tmp_path, *faults, more=more)
    assert [e.status for e in exits] == [0, 0], exits[0].output
    skipped = [row["iteration"] for row in curve(tmp_path) if "skipped_steps" in row]
    assert skipped == [2, 4, 6]  # a spike is only looked for on request
    first, second, third = (
        json.loads((tmp_path / "anomalies" / f"iter_{i:07d}.json").read_text()) for i in (2, 4, 6)
    )
    samples = effective_samples(unbroken / "trace")
    for report, rank, reason in (
        (first, 0, "loss is nan"),
        (second, 1, "gradient norm is nan"),
        (third, 0, "gradient norm is nan"),
    ):
        (entry,) = (e for e in report["ranks"] if e["rank"] == rank)
        assert [e["rank"] for e in report["ranks"]] == [rank]
        assert report["reason"] == reason
        assert report["consumed_samples"] == 4 * (report["iteration"] - 1)
        named = [name for m in entry["micro_batches"] for name in m["sample_ids"]]
        assert set(named) < set(samples[report["iteration"]])
    (bad,) = (m for m in first["ranks"][0]["micro_batches"] if m["text"] == "nan")
    assert bad["number"] == 2  # the second of replica 0, of two
    state = json.loads((tmp_path / "iter_0000006" / "train_state.json").read_text())
    assert (state["num_skipped"], state["skipped_in_a_row"]) == (3, 1)
    assert state["consumed_samples"] == 24

    stopped = tmp_path / "stopped"
    nan = [Fault(fault="nan_gradient", rank=1, iteration=i) for i in (3, 4, 5)]
    exits = run(data, stopped, *nan, more=more)
    assert [e.status for e in exits] == [1, 1]
    assert "2 steps in a row had to be skipped, the last is 4" in exits[0].output
    assert str(stopped / "anomalies" / "iter_0000004.json") in exits[0].output
    assert latest(stopped) == 2  # from before them
    run(data, stopped)  # the device was changed
    assert curve(stopped) == curve(unbroken)


def replay_after(data: Path, save: Path, sample: str | None, report: Path) -> int:
    from megatron_croc.cli.replay import main
    from megatron_croc.verification.faults.inject import inject

    if sample is not None:
        inject(Fault(fault="bad_sample", name=sample))
    return main([str(report)])


def test_replay_finds_the_sample_and_the_module(data: Path, unbroken: Path, tmp_path: Path):
    sample = effective_samples(unbroken / "trace")[4][2]
    faults = [Fault(fault="bad_sample", rank=rank, name=sample) for rank in (0, 1)]
    exits = run(data, tmp_path, *faults)
    assert [e.status for e in exits] == [0, 0]
    report = tmp_path / "anomalies" / "iter_0000004.json"
    text = report.read_text()
    assert sample in text
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    # Step 4 lies one step beyond checkpoint 2; one process stands in for the two of the run.
    (again,) = run_to_exit(replay_after, 1, data, tmp_path, sample, report)
    assert again.status == 0, again.output
    assert "weights: iteration 2, and 1 steps from there" in again.output
    blocks = again.output.split("micro-batch ")[1:]
    (bad,) = (block for block in blocks if "not finite" in block)
    assert f"{sample}  text loss nan" in bad
    assert "first value that is not finite: output of vision_tower." in bad
    assert "first gradient that is not finite" in bad
    # Its weights are those of the run: the other samples' losses add up to the ones reported.
    (entry,) = (e for e in json.loads(text)["ranks"] if sample in json.dumps(e))
    assert sum(m["text"] == "nan" for m in entry["micro_batches"]) == 1
    (healthy,) = run_to_exit(replay_after, 1, data, tmp_path, None, report)
    assert healthy.status == 2 and "it is right this time" in healthy.output
    whole = next(row for row in curve(unbroken) if row["iteration"] == 4)
    line = next(line for line in healthy.output.splitlines() if line.startswith("loss "))
    assert float(line.split()[1]) == pytest.approx(whole["loss"], rel=1e-5)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files
    (absent,) = run_to_exit(replay_after, 1, data, tmp_path, None, tmp_path / "none.json")
    assert absent.status == 1 and "none.json" in absent.output


def refuse_and_compare(spike: bool, changes: dict) -> dict:
    """Run good steps and one refused step; check that the refused one changes nothing."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_training_state
    from megatron_croc.training.safety.anomaly import AnomalyGuard
    from megatron_croc.training.safety.heartbeat import enter
    from megatron_croc.verification.faults.inject import inject

    run = tiny_run(spike_factor=5.0 if spike else 0.0, **changes)
    pg = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, pg, train_iters=40)
    guard = AnomalyGuard(
        run.reliability, training.state, pg, settings={}, train_iters=40, folder=None
    )
    kind = "spike" if spike else "nan_loss"
    last = 10 if spike else 2
    inject(Fault(fault=kind, rank=1, iteration=last))

    def snapshot() -> list[torch.Tensor]:
        inner = training.optimizer.chained_optimizers[0].optimizer
        moments = [state[k] for state in inner.state.values() for k in ("exp_avg", "exp_avg_sq")]
        steps = [torch.tensor(group["step"]) for group in inner.param_groups]
        weights = [p.detach() for chunk in training.chunks for p in chunk.parameters()]
        return [tensor.clone() for tensor in (*weights, *moments, *steps)]

    for step in range(1, last + 1):
        enter("waiting", iteration=step)
        before, rate = snapshot(), training.scheduler.num_steps
        batches = make_step(run, step, dp_rank=pg.dp.rank(), dp_size=pg.dp.size(), images=(1, 0))
        metrics = training.train_step.train(
            batches, training.optimizer, training.scheduler, guard=guard
        )
        training.state.iteration += 1
        same = [torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True)]
        assert metrics.is_skipped == (step == last)
        assert all(same) == (step == last)
        assert training.scheduler.num_steps == rate + run.training.global_batch_size
    return {"skipped": training.state.num_skipped, "grad_norm": metrics.grad_norm}


@pytest.mark.parametrize(
    ("spike", "changes"),
    [
        (False, {"bf16": False}),
        (False, {"bf16": True}),
        (False, {"pipeline_model_parallel_size": 2}),
        (False, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (True, {}),
    ],
    ids=["fp32", "bf16", "pp2", "tp2", "spike"],
)
def test_a_refused_step_moves_nothing_on_any_rank(spike: bool, changes: dict):
    results = run_distributed(refuse_and_compare, 2, spike, changes)
    assert [result["skipped"] for result in results] == [1, 1]
    assert all(math.isnan(result["grad_norm"]) != spike for result in results)


def soak_run(data: Path, save: Path) -> dict:
    from megatron_croc.verification.faults.soak import growth, soak

    valid = f"--valid-data-path={data / 'valid_pretrain_croc'}"
    return growth(soak([*train_words(data, save), valid], steps=100))


def test_a_longer_run_does_not_grow(data: Path, tmp_path: Path):
    (grown,) = run_distributed(soak_run, 1, data, tmp_path)
    assert all(grown[name] <= 0 for name in ("files", "threads", "shared")), grown
    assert grown["rss"] < 32  # a loader or a graph kept alive at each step would add more
