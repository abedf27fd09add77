"""`croc prove`: time boxes, results, going on, and cards, with stages made for the test."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_croc.cli.prove import main
from megatron_croc.errors import ConfigError
from megatron_croc.verification.prove import figures
from megatron_croc.verification.prove.card import card
from megatron_croc.verification.prove.machine import Machine
from megatron_croc.verification.prove.result import Result, read_result
from megatron_croc.verification.prove.runner import Job, run_stages
from megatron_croc.verification.prove.stage import Command, Place, Stage
from megatron_croc.verification.prove.stages import STAGES

ROOT = Path(__file__).parents[3]
MACHINE = Machine(
    device="NVIDIA H100 80GB HBM3",
    num_gpus=1,
    memory_gib=79.2,
    driver="580.1",
    cores=16,
    python="3.12.3",
    versions={"torch": "2.11.0+cu130"},
)


def stage(name: str, *scripts: str, **changes: object) -> Stage:
    def commands(place: Place) -> list[Command]:
        return [Command(words=(sys.executable, "-c", script)) for script in scripts]

    fields = dict(name=name, shows=f"that {name} works", minutes=5.0, commands=commands)
    return Stage(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def job(tmp_path: Path, lines: list[str]) -> Job:
    place = Place(
        folder=tmp_path, shared=tmp_path, checkout=tmp_path, machine=MACHINE, is_small=False
    )
    return Job(out=tmp_path, place=place, minutes=25, commit="abc", tell=lines.append)


def test_a_failure_and_a_hang_do_not_end_the_list(job: Job, lines: list[str]):
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    child = f"import subprocess, sys; subprocess.run({sleeper})"
    stages = [
        stage("good", "print('fine')", "open('x', 'w')"),
        stage("bad", "raise SystemExit('error: no memory')", "open('never', 'w')"),
        stage("hangs", child, minutes=1.5 / 60),
        stage("absent", "1", missing=lambda place: "needs two GPUs or more"),
        stage("last", "1"),
    ]
    started = time.monotonic()
    results = run_stages(stages, job)
    assert [r.status for r in results] == ["passed", "failed", "timed out", "skipped", "passed"]
    assert time.monotonic() - started < 30
    assert results[1].reason == "error: no memory (status 1, log bad/0.log)"
    assert (job.out / "x").exists() and not (job.out / "never").exists()
    assert results[3].reason == "needs two GPUs or more"
    assert [line.split()[0] for line in lines] == [s.name for s in stages]
    # Nothing that a stage started outlives its box.
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "time.sleep(60)" not in listed.stdout


def test_results_are_kept_and_what_failed_runs_again(job: Job, lines: list[str]):
    count = "open('count', 'a').write('x')"
    stages = [stage("one", count), stage("two", "raise SystemExit(1)")]
    run_stages(stages, job)
    run_stages([stages[0], stage("two", count)], job)
    assert (job.out / "count").read_text() == "xx"
    assert lines[2] == f"{'one':<14} passed, from an earlier run"
    assert read_result(job.out / "two.json").status == "passed"
    # Another commit, another machine or --again: nothing is kept.
    run_stages(stages[:1], replace(job, commit="def"))
    run_stages(stages[:1], replace(job, commit="def"), again=True)
    other = replace(job.place, machine=replace(MACHINE, device="NVIDIA H200"))
    run_stages(stages[:1], replace(job, commit="def", place=other))
    assert (job.out / "count").read_text() == "xxxxx"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"form": 1, "result": {"stage": 3}}', "\x00"])
def test_a_damaged_result_is_no_result(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    assert read_result(tmp_path / "a.json") is None


def test_time_that_is_used_up_is_told(job: Job):
    stages = [stage("slow", "import time; time.sleep(60)", minutes=25), stage("late", "1")]
    results = run_stages(stages, replace(job, minutes=0.2 / 60))
    assert [r.status for r in results] == ["timed out", "not reached"]


def test_ctrl_c_ends_the_list_and_its_process(job: Job):
    script = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt, match="stopped in first"):
        run_stages([stage("first", script), stage("second", "open('no', 'w')")], job)
    assert read_result(job.out / "first.json").status == "interrupted"
    assert not (job.out / "no").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_card_says_what_was_not_measured(job: Job):
    found = {"MFU (micro-batch 4, visual)": 0.51, "tokens/s": 12000}
    ran = Result(
        stage="step",
        status="passed",
        date="2026-01-02",
        commit="abc",
        commands=("python benchmarks/step.py",),
        figures=found,
        machine=MACHINE,
    )
    late = replace(ran, stage="late", status="failed", reason="error: a | b", figures={})
    skipped = replace(ran, stage="skipped", status="skipped", reason="needs a GPU", figures={})
    stages = [stage(name, "1") for name in ("step", "late", "skipped", "never")]
    text = card("croc_7b", stages, {r.stage: r for r in (ran, late, skipped)})
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if " | " in line)
    where = "1 x NVIDIA H100 80GB HBM3, 79 GiB | 2026-01-02 | abc"
    assert rows["that step works"] == f"passed | {where}"
    assert rows["that late works"] == f"**failed**: error: a / b | {where}"
    assert rows["that skipped works"].startswith("not measured (needs a GPU)")
    assert rows["that never works"].startswith("not measured")
    assert rows["MFU (micro-batch 4, visual)"] == "0.51" and rows["tokens/s"] == "12,000"
    assert "    python benchmarks/step.py\n" in text
    assert "driver 580.1; Python 3.12.3; torch 2.11.0+cu130." in text


def test_figures_of_a_step(tmp_path: Path):
    row = dict(setting="micro-batch 1", mask="visual", seconds=0.5, tokens_per_second=1822.2)
    row |= dict(samples_per_second=2.0, mfu=0.5, peak_gib=70.26, matching_share=0.004)
    rows = [row, {"setting": "micro-batch 8", "reason": "out of memory"}]
    (tmp_path / "step.json").write_text(json.dumps({"rows": rows}))
    assert figures.of_step(tmp_path) == {
        "s a step (micro-batch 1, visual)": 0.5,
        "tokens/s (micro-batch 1, visual)": 1822,
        "samples/s (micro-batch 1, visual)": 2.0,
        "MFU (micro-batch 1, visual)": 0.5,
        "waiting for the matching, of a step (micro-batch 1, visual)": 0.004,
        "GiB at the peak (micro-batch 1, visual)": 70.3,
        "does not run (micro-batch 8)": "out of memory",
    }
    assert figures.of_step(tmp_path / "none") == {}


def test_figures_of_costs(tmp_path: Path):
    rows = {"matmul": {"each": 1e-5, "per_flop": 2e-15}, "elementwise": {"per_byte": 4e-13}}
    (tmp_path / "costs.json").write_text(json.dumps({"launch": 5e-6, "operations": rows}))
    assert figures.of_costs(tmp_path) == {
        "TFLOP/s (matmul)": 500.0,
        "TB/s (elementwise)": 2.5,
        "seconds of a launch": 5e-6,
    }


def test_cards_are_written_from_results_of_another_machine(job: Job, tmp_path: Path, capsys):
    result = Result(stage="doctor", status="passed", date="2026-01-02", machine=MACHINE)
    result.write(tmp_path)
    words = ["--cards-only", "--out", str(tmp_path), "--cards", str(tmp_path / "cards")]
    assert main([*words, "--checkout", str(Path(__file__).parents[3])]) == 0
    text = (tmp_path / "cards" / "croc_7b.md").read_text()
    assert "| passed | 1 x NVIDIA H100 80GB HBM3, 79 GiB | 2026-01-02 |" in text
    assert text.count("not measured") == sum("croc_7b" in s.recipes for s in STAGES) - 1
    replace(result, is_small=True).write(tmp_path)
    main([*words, "--checkout", str(Path(__file__).parents[3])])
    assert "passed" not in (tmp_path / "cards" / "croc_7b.md").read_text()


def test_the_boxes_are_those_of_a_loan_and_names_are_unique():
    one_gpu = [s for s in STAGES if s.name not in ("layouts", "network")]
    assert sum(s.minutes for s in one_gpu) <= 25
    assert len({s.name for s in STAGES}) == len(STAGES)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes", "0"], "--minutes 0.0: a number of minutes above 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--checkout", "/"], "no benchmarks/ there"),
        (["--small", "--cards", "cards"], "--cards with --small"),
        (["--cards-only"], "--cards-only: name their folder with --cards"),
    ],
)
def test_wrong_options_are_told_before_anything_starts(words, told, monkeypatch):
    from megatron_croc.errors import ConfigError

    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ConfigError) as raised:
        main(words)
    assert told in str(raised.value)


def test_the_released_code_is_looked_for_before_anything_runs(tmp_path: Path):
    words = ["--small", "--out", str(tmp_path / "out"), "--checkout", str(ROOT)]
    with pytest.raises(ConfigError, match=r"--peer-croc .*: no folder croc/model in it"):
        main([*words, "--peer-croc", str(tmp_path)])
    (tmp_path / "croc" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--python-croc nowhere: there is no such program"):
        main([*words, "--peer-croc", str(tmp_path), "--python-croc", "nowhere"])
    with pytest.raises(ConfigError, match="--python-croc without --peer-croc"):
        main([*words, "--python-croc", "nowhere"])
    assert not (tmp_path / "out").exists()


def test_the_released_step_is_left_out_by_name(job: Job):
    (found,) = run_stages([s for s in STAGES if s.name == "beside_release"], job)
    assert (found.status, found.reason) == (
        "skipped",
        "needs --peer-croc, a checkout of the released code",
    )


def test_figures_of_the_released_step(tmp_path: Path):
    row = {"clock": "wall", "ratio": 0.5, "ours": {"wall": 0.1, "peak_mib": 2048}}
    row["released"] = {"wall": 0.2, "peak_mib": 4096}
    content = {"comparisons": {"croc/wide/32000": row}}
    (tmp_path / "step_beside_release.json").write_text(json.dumps(content))
    assert figures.of_beside_release(tmp_path) == {
        "time, ours / released (croc/wide/32000, wall)": 0.5,
        "s a step (croc/wide/32000, ours)": 0.1,
        "GiB at the peak (croc/wide/32000, ours)": 2.0,
        "s a step (croc/wide/32000, released)": 0.2,
        "GiB at the peak (croc/wide/32000, released)": 4.0,
    }


def test_what_an_interrupted_attempt_left_is_in_nobodys_way(job: Job):
    left = job.out / "export" / "hf"
    left.mkdir(parents=True)
    (job.out / "export" / "0.log").touch()
    (found,) = run_stages([stage("export", f"import os; os.mkdir({str(left)!r})")], job)
    assert found.status == "passed", found.reason
    another = job.out / "results" / "mine"
    another.mkdir(parents=True)
    run_stages([stage("results", "1")], job)
    assert another.exists()
