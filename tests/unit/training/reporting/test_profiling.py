"""Steps of the profiler's window, and content of the trace."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_croc.parallel.stopwatch import drop_stopwatch, region, start_stopwatch
from megatron_croc.training.reporting.profiling import ProfileWindow
from tests.support.synthetic import tiny_run


def run_steps(folder: Path, first: int, last: int, **changes) -> None:
    """Steps that each multiply matrices of their own size inside a region."""
    run = tiny_run(log_dir=str(folder), profile_step_start=3, profile_step_end=5, **changes)
    start_stopwatch()
    window = ProfileWindow(run.logging, run.log_folder, first - 1)
    for iteration in range(first, last + 1):
        with region("vision"):
            torch.ones(iteration, 7) @ torch.ones(7, iteration)
        window.after_step(iteration)
    window.close()
    drop_stopwatch()


def trace_of(path: Path) -> list[dict]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def test_the_trace_holds_the_steps_of_the_window_and_names_the_regions(tmp_path: Path):
    run_steps(tmp_path, 1, 7, profile=True)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank_00000_steps_3_4.json.gz"
    events = trace_of(path)
    products = [event for event in events if event.get("name") == "aten::mm"]
    assert [event["args"]["Input Dims"][0] for event in products] == [[3, 7], [4, 7]]
    assert len([e for e in events if e.get("name") == "vision" and e["ph"] == "X"]) == 2


def test_a_run_that_ends_inside_the_window_still_writes(tmp_path: Path):
    run_steps(tmp_path, 1, 3, profile=True)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank_00000_steps_3_end.json.gz" and trace_of(path)


@pytest.mark.parametrize("changes", [{}, dict(profile=True, profile_ranks=(1,))])
def test_nothing_is_written_unasked(tmp_path: Path, changes: dict):
    run_steps(tmp_path, 1, 7, **changes)
    assert not (tmp_path / "profile").exists()


def test_a_run_resumed_behind_the_window_says_so(tmp_path: Path, caplog):
    with caplog.at_level("WARNING"):
        run_steps(tmp_path, 6, 7, profile=True)
    assert "profile_step_start=3: the run is at step 5 already" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_a_cpu_has_no_memory_history(tmp_path: Path, caplog):
    with caplog.at_level("WARNING"):
        run_steps(tmp_path, 1, 7, record_memory_history=True)
    assert "record_memory_history: only a CUDA device keeps one" in caplog.text
    assert not list(tmp_path.glob("profile/*memory*"))
