"""`croc rehearse`: real ranks of small and large jobs on the fake device, and planted faults."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_croc.cli import rehearse
from megatron_croc.config.run import RunConfig
from megatron_croc.data.demo.small import write_demo
from megatron_croc.recipes.command_line import parse_command, run_parser
from megatron_croc.rehearsal.classes import rank_classes
from megatron_croc.rehearsal.findings import Findings, gather
from megatron_croc.rehearsal.job import Job, Rows, settings_of
from megatron_croc.rehearsal.run import Outcome, Rehearsal, children_at_once, perform

ROOT = Path(__file__).parents[2]

PLANTED = (
    *("device_mismatch", "host_tensor_to_nccl", "strided_tensor_to_nccl"),
    *("strided_tensor_to_triton",),
)

TINY = ("--recipe", "tiny/pretrain_croc", "--bf16", "--micro-batch-size", "1")
TINY += ("--global-batch-size",)

LAYOUTS = {
    "dp4": (),
    "tp4": ("--tensor-model-parallel-size", "4", "--no-sequence-parallel"),
    "tp2+sp dp2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "tp2 pp2": ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    "pp4": ("--pipeline-model-parallel-size", "4"),
    "pp2 vpp2 dp2": (
        *("--pipeline-model-parallel-size", "2"),
        *("--virtual-pipeline-model-parallel-size", "2"),
    ),
    "cp2 dp2": ("--context-parallel-size", "2"),
    "cp2 tp2": ("--context-parallel-size", "2", "--tensor-model-parallel-size", "2"),
    "pp2 cp2": ("--context-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
}


def parse(words: Sequence[str]) -> RunConfig:
    return parse_command(run_parser(prog="", description=""), list(words))[1]


def rehearse_all(words: Sequence[str], world_size: int, folder: Path, minutes: float) -> Findings:
    """Rehearse a job as the command does."""
    folder.mkdir()
    rehearsal = Rehearsal(
        run=parse(words),
        world_size=world_size,
        gpu="h100",
        rows=Rows(kind="longest"),
        folder=folder,
    )
    perform(
        rehearsal,
        at_once=children_at_once(None),
        time_limit=60 * minutes,
        tell=lambda line: print(line, flush=True),
    )
    return gather(rehearsal)


def run_planted(jobs: Sequence[Path]) -> None:
    """Run jobs with the faults that their names ask for."""
    command = [sys.executable, "-m", "tests.support.planted_faults", "2", *jobs]
    subprocess.run(command, check=True, timeout=400, cwd=ROOT)


def check_memory(findings: Findings, *, within: float) -> None:
    """No fault; weights, gradients and optimizer as estimated, the peak close to it."""
    assert findings.faults == []
    for entry in findings.classes:
        for name in ("weights", "gradients", "optimizer"):
            estimate = getattr(entry.estimate, name)
            # Beside buffers of the model, and padding of buckets and of small tensors.
            assert entry.parts[name] == pytest.approx(estimate, rel=0.02, abs=3e5), entry.name
        assert entry.error is not None and abs(entry.error) < within, (entry.name, entry.error)
        for phase, estimate in (
            ("build", entry.estimate.construction),
            ("save", entry.estimate.saving),
        ):
            assert entry.peaks[phase] == pytest.approx(estimate, rel=0.03, abs=2e6), entry.name


@pytest.mark.distributed
def test_a_job_of_four_ranks_from_the_command(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = [*TINY, "2", "--world-size", "4", *LAYOUTS["tp2 pp2"], "--out", str(out)]
    assert rehearse.main(words) == 0
    text = capsys.readouterr().out
    assert "no fault found" in text and "4 classes for 4 GPUs" in text
    assert "predicted step: " in text
    report = json.loads((out / "report.json").read_text())
    assert [entry["rank"] for entry in report["classes"]] == [0, 1, 2, 3]
    first, last = report["classes"][0], report["classes"][2]
    assert set(first["peaks"]) == {"build", "step", "evaluate", "save"}
    held = [" ".join(entry["parts"]) for entry in (first, last)]
    assert "projector" in held[0] and "projector" not in held[1]
    assert "reconstruction_head" in held[1] and "reconstruction_head" not in held[0]
    calls = {(row["phase"], row["collective"], row["group"]): row for row in first["traffic"]}
    assert calls["step", "send", "pp"]["count"] == calls["step", "receive", "pp"]["count"] == 2
    # The host may wait for the device at two places of a step: the gradient's norm, the metrics.
    assert sum(n for phase, *_, n in first["reads"] if phase == "step") == 2
    assert not [wait for wait in first["waits"] if wait[0] == "step" and "objects" not in wait[1]]
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 4 and "Nothing here ran on a GPU" in page
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert json.loads((out / "step.trace.json").read_text())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of jobs with a fault each, and of jobs on data, by name; all from one process."""
    folder = tmp_path_factory.mktemp("planted")
    demo = write_demo(folder / "demo", ("pretrain_croc",), num_images=40)
    tokenizer = ("--tokenizer-model", str(demo / "tokenizer.model"))
    on_data, nowhere = demo / "pretrain_croc", folder / "nowhere"
    runs = {name: parse([*TINY, "2"]) for name in PLANTED}
    runs["data"] = parse([*TINY, "8", "--data-path", str(on_data), *tokenizer])
    runs["no data"] = parse([*TINY, "8", "--data-path", str(nowhere), *tokenizer])
    jobs = []
    for name, run in runs.items():
        jobs.append(folder / f"rank_0@{name}")
        rows = Rows(kind="data" if name in ("data", "no data") else "longest", text_tokens=20.0)
        Job(settings=settings_of(run), rank=0, world_size=2, gpu="h100", rows=rows).write(jobs[-1])
    run_planted(jobs)
    return {
        name: json.loads(job.with_suffix(".result.json").read_text())
        for name, job in zip(runs, jobs, strict=True)
    }


@pytest.mark.distributed
def test_rows_come_from_the_plan_of_the_data(planted: dict[str, dict[str, Any]]) -> None:
    result = planted["data"]
    assert result["rows"]["micro_batches"] == 4 and result["faults"] == []
    # Captions of the demo have an image each and differ in length.
    assert result["rows"]["images"] == 4
    assert result["rows"]["mean_tokens"] < result["rows"]["most_tokens"] < 200


@pytest.mark.distributed
def test_data_that_cannot_be_read_is_one_line(planted: dict[str, dict[str, Any]]) -> None:
    told = planted["no data"]["refused"]
    assert "nowhere" in told and "\n" not in told


@pytest.mark.distributed
def test_a_device_mismatch_is_found(planted: dict[str, dict[str, Any]]) -> None:
    result = planted["device_mismatch"]
    assert result["phase"] == "step"
    assert "DeviceMismatch" in result["error"] and "cpu" in result["error"], result["error"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("host_tensor_to_nccl", ("all_reduce: float64 [2] is on cpu", "step.py")),
        (
            "strided_tensor_to_nccl",
            ("all_reduce: float64 [2] is not contiguous", "planted_faults.py"),
        ),
        (
            "strided_tensor_to_triton",
            ("solve_images: cost", "is not contiguous", "planted_faults.py"),
        ),
    ],
)
def test_calls_that_would_fail_are_found(
    planted: dict[str, dict[str, Any]], name: str, words: Sequence[str]
) -> None:
    ((text, _),) = [fault for fault in planted[name]["faults"] if words[0] in fault[0]]
    assert all(word in text for word in words), text


PP2 = ("--pipeline-model-parallel-size", "2")

DEADLOCKS: dict[str, tuple[tuple[int, ...], Sequence[str], Sequence[str]]] = {
    "missing_collective": (
        (1,),
        (),
        ("rank 0 waits in", "use of dp of", "training/step.py", "rank 1 waits in"),
    ),
    "channel_not_opened": (
        (0, 1),
        PP2,
        ("rank 0 waits in the first use of embd, the pair", "target_channel.py", "rank 1 waits in"),
    ),
    "wait_beside_an_open_send": (
        (0, 1),
        PP2,
        ("rank 0 waits in synchronize", "for its send to rank 1 (embd)", "target_channel.py"),
    ),
    "target_not_received": (
        (1,),
        PP2,
        ("its send to rank 1 (embd)", "target_channel.py", "rank 1"),
    ),
    "both_send_first": (
        (0, 1),
        PP2,
        ("rank 0 waits", "send to rank 1 (world", "rank 1 waits", "send to rank 0 (world"),
    ),
}
"""Planted fault -> ranks that have it, flags of the job, words of the message."""


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", DEADLOCKS)
def test_a_deadlock_is_found_with_both_its_sides(name: str, tmp_path: Path) -> None:
    ranks, flags, words = DEADLOCKS[name]
    run = parse([*TINY, "2", *flags])
    rehearsal = Rehearsal(
        run=run, world_size=2, gpu="h100", rows=Rows(kind="longest"), folder=tmp_path
    )
    jobs = []
    for entry in rank_classes(run.parallel, 2):
        path = tmp_path / f"rank_{entry.rank}{f'@{name}' if entry.rank in ranks else ''}"
        Job(
            settings=settings_of(run),
            rank=entry.rank,
            world_size=2,
            gpu="h100",
            rows=rehearsal.rows,
            stands_for=list(entry.stands_for),
        ).write(path)
        jobs.append(path)
    run_planted(jobs)
    for entry, path in zip(rank_classes(run.parallel, 2), jobs, strict=True):
        result = json.loads(path.with_suffix(".result.json").read_text())
        trace = path.with_suffix(".trace.jsonl")
        rehearsal.outcomes.append(Outcome(of=entry, result=result, trace=trace))
    texts = [fault.text for fault in gather(rehearsal).faults]
    print(*texts, sep="\n")
    assert texts[0].startswith("deadlock") and all(word in texts[0] for word in words), texts


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_four_ranks(name: str, tmp_path: Path) -> None:
    check_memory(rehearse_all((*TINY, "8", *LAYOUTS[name]), 4, tmp_path / "job", 8), within=0.25)


REAL_SIZE = {
    "croc_7b tp2 pp4, 64": ("croc_7b/pretrain_croc", 64, ("--pipeline-model-parallel-size", "4")),
    "croc_7b tp4 pp2 cp2, 512": (
        "croc_7b/pretrain_croc",
        512,
        (
            *("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2"),
            *("--context-parallel-size", "2", "--global-batch-size", "512"),
        ),
    ),
    "croc_13b, 64": ("croc_13b/pretrain_croc", 64, ()),
    "victor_7b, 64": ("victor_7b/finetune", 64, ()),
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_SIZE)
def test_models_of_real_size(name: str, tmp_path: Path) -> None:
    recipe, world_size, flags = REAL_SIZE[name]
    findings = rehearse_all(("--recipe", recipe, *flags), world_size, tmp_path / "job", 20)
    check_memory(findings, within=0.06)


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(rehearse, "perform", refuse)
    yield


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--world-size", "3", "--tensor-model-parallel-size", "2"), "3"),
        (("--world-size", "2048"), "--world-size 2048: must lie between 1 and 1024"),
        (("--gpu", "h1000"), "h1000"),
        (("--jobs", "0"), "--jobs 0: must be 1 or more"),
        (("--text-tokens", "-1"), "--text-tokens -1.0: must lie between"),
        (("--time-limit", "0"), "--time-limit 0: must be above 0"),
        (("--data", "x", "--text-tokens", "10"), "give one of them"),
        (("--data", "/nowhere"), "/nowhere"),
        (("--transformer-impl", "te"), "transformer_impl=te"),
    ],
)
def test_bad_input_is_one_line_before_a_child_starts(
    words: Sequence[str], message: str, capsys: Any
) -> None:
    assert rehearse.main(["--recipe", "tiny/finetune", *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.usefixtures("no_children")
def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from megatron_croc.rehearsal import versions

    monkeypatch.setattr(versions, "version", lambda name: "2.12.1" if name == "torch" else "0.16.1")
    assert rehearse.main(["--recipe", "tiny/finetune"]) == 1
    assert "tried with 2.13, not with 2.12.1; install" in capsys.readouterr().err


@pytest.mark.distributed
def test_without_a_compiler_there_are_forward_passes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = [*TINY, "2", "--world-size", "2"]
    assert rehearse.main(words) == 0
    text = capsys.readouterr().out
    assert (
        "forward passes only" in text and "no C++ compiler is installed (no-such-compiler)" in text
    )
    assert not list(tmp_path.rglob("*.so"))
