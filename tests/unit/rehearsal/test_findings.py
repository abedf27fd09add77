"""The report: memory beside the estimate, faults with their way out, in words, JSON and a page."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_croc.planning.memory import Pack, estimate_memory
from megatron_croc.recipes import get_recipe
from megatron_croc.rehearsal import findings, run
from megatron_croc.rehearsal.classes import rank_classes
from megatron_croc.rehearsal.findings import gather, grouped
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.page import as_page
from megatron_croc.rehearsal.prediction import Prediction
from megatron_croc.rehearsal.report import as_json, lines
from megatron_croc.rehearsal.run import Outcome, Rehearsal

GIB = 2**30
PACK = {"tokens": 3040, "images": 2, "labels": 1880}
PARTS = {
    "activations, language_model.decoder": 5 * GIB,
    "activations, language_model.rotary_pos_emb": GIB,
    "weights": 2 * GIB,
    "building": GIB,
}


def result(rank: int, stage: int, **changes: Any) -> dict[str, Any]:
    def peak(total: float, parts: dict[str, int]) -> dict[str, Any]:
        return {"total": int(total), "parts": parts, "place": "a.py:1", "largest": []}

    sent = {"phase": "step", "collective": "send", "group": "pp", "size": 2}
    return {
        "rank": rank,
        "forward_only": None,
        "cpu_seconds": 12.0,
        "host_bytes": GIB // 2,
        "rows": {"micro_batches": 8, "mean_tokens": 3040.0, "most_tokens": 3040, "images": 16},
        "pack": PACK,
        "peaks": {
            "build": peak(7 * GIB, {}),
            "step": peak(9 * GIB, PARTS),
            "evaluate": peak(6 * GIB, {}),
            "save": peak(7 * GIB, {}),
        },
        "curve": [GIB, 9 * GIB, 2 * GIB],
        "flops": {"mm": 3 * 10**12},
        "traffic": [{**sent, "count": 8, "bytes": 8 * 2**20}] if stage == 0 else [],
        "reads": [["step", "item", "clip_grads.py:133", 1], ["save", "item", "x.py:1", 3]],
        "waits": [["step", "torch.cuda.synchronize", "p2p.py:242", 42]],
        "faults": [],
    } | changes


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    """Two pipeline stages, done without a child."""
    monkeypatch.setattr(findings, "predict", lambda *_: Prediction([], None))
    config = get_recipe("croc_7b/pretrain_croc")
    config.parallel.pipeline_model_parallel_size = 2
    done = Rehearsal(
        run=config, world_size=4, gpu="h100", rows=Rows(kind="longest"), folder=tmp_path
    )
    done.outcomes = [
        Outcome(of=entry, result=result(entry.rank, entry.place["pp"]), trace=tmp_path / "t")
        for entry in rank_classes(config.parallel, 4)
    ]
    return done


def test_classes_stand_beside_the_estimate(rehearsal: Rehearsal) -> None:
    found = gather(rehearsal)
    assert [entry.rank for entry in found.classes] == [0, 1, 2, 3] and found.faults == []
    estimates = estimate_memory(rehearsal.run, 4, Pack(**PACK))
    for entry in found.classes:
        assert entry.estimate == estimates[entry.stage]
        assert entry.error == pytest.approx(estimates[entry.stage].total / (9 * GIB) - 1)
        assert entry.highest == ("step", 9 * GIB)
    shown = grouped(found.classes[0].parts)
    assert shown == {
        "activations: language model": 6 * GIB,
        "weights": 2 * GIB,
        "other": GIB,
    }
    text = "\n".join(lines(rehearsal, found))
    assert "42x  torch.cuda.synchronize  p2p.py:242" in text and "x.py" not in text
    assert "send        pp of 2  8 x 1.00" in text and text.endswith("no fault found")
    assert "4 classes for 4 GPUs in 0 s (48 s of CPU), 0.5 GiB each at most" in text
    tree = json.loads(as_json(rehearsal, found))
    assert tree["classes"][3]["peaks"]["build"] == 7 * GIB and tree["faults"] == []
    page = as_page(rehearsal, found)
    assert page.count('class="estimate"') == 4 and "No fault found." in page
    assert "PP 2" in page and "torch.cuda.synchronize" in page


def test_faults_of_several_ranks_are_told_once(rehearsal: Rehearsal) -> None:
    broken = {"error": "DeviceMismatchError: <cuda, cpu> at step.py:7", "phase": "step"}
    rehearsal.outcomes[1].result = {"rank": 1, **broken}
    rehearsal.outcomes[3].result = {"rank": 3, **broken}
    refused = "all_reduce: float32 [2] is on cpu, at step.py:9"
    rehearsal.outcomes[0].result["faults"] = [[refused, 8]]
    found = gather(rehearsal)
    texts = {fault.ranks: (fault.text, fault.way_out) for fault in found.faults}
    assert texts["ranks 1, 3"][0] == broken["error"] and "to_device()" in texts["ranks 1, 3"][1]
    assert texts["rank 0"][0] == refused
    told = "\n".join(lines(rehearsal, found))
    assert told.count("step.py:7") == 1 and "no fault found" not in told
    assert "&lt;cuda, cpu&gt;" in as_page(rehearsal, found)
    for outcome in rehearsal.outcomes:
        outcome.result = {"rank": outcome.of.rank, **broken}
    alone = gather(rehearsal)
    assert alone.classes == [] and "ranks 0, 1, 2, 3" in "\n".join(lines(rehearsal, alone))
    assert "ranks 0, 1, 2, 3" in as_page(rehearsal, alone)


@pytest.mark.parametrize("phase", ["build", "save"])
def test_a_job_that_does_not_fit_is_a_fault_in_any_phase(rehearsal: Rehearsal, phase: str) -> None:
    rehearsal.outcomes[2].result["peaks"][phase]["total"] = 70 * GIB
    (fault,) = gather(rehearsal).faults
    word = {"build": "construction", "save": "saving"}[phase]
    assert fault.ranks == "rank 2" and f"its {word} peaks at 70.0 GiB" in fault.text
    assert "does not fit on h100" in fault.text and "fit with --" in fault.way_out


def test_a_replay_that_finds_a_fault_is_told(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "predict", lambda *_: Prediction(["rank 0 waits"], None))
    (fault,) = gather(rehearsal).faults
    assert fault.text == "rank 0 waits"


def test_a_child_that_left_no_result(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("phase step\nSegmentation fault\n")
    assert "out of host memory?" in run._end(-signal.SIGKILL, log)
    assert run._end(-signal.SIGSEGV, log) == "Segmentation fault (SIGSEGV)"


def test_children_at_once_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(run, "free_memory", lambda: 5 * run.CHILD_BYTES)
    assert run.children_at_once(None) == 5 and run.children_at_once(3) == 3
    monkeypatch.setattr(run, "free_memory", lambda: 0.0)
    assert run.children_at_once(None) == 1
