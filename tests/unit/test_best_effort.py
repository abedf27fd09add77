"""Files beside training on a full disk: one warning, tried again, and never an error."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_croc import best_effort
from megatron_croc.best_effort import AppendedLines, BestEffort
from megatron_croc.training.safety import heartbeat
from megatron_croc.training.safety.heartbeat import enter, read_beat, share_heartbeat
from tests.support.synthetic import tiny_run


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Warnings and notes, in order."""
    found: list[str] = []
    for name in ("warning", "info"):
        monkeypatch.setattr(best_effort.logger, name, lambda form, *args: found.append(form % args))
    return found


@pytest.fixture
def disk(monkeypatch) -> list[int]:
    """Bytes that the disk still takes; it writes what fits, then fails."""
    room = [10**9]
    write, pwrite, fsync = os.write, os.pwrite, os.fsync

    def take(length: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(length, room[0])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: take(len(data))]))
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: pwrite(f, data[: take(len(data))], at))
    monkeypatch.setattr(os, "fsync", lambda file: (take(1), fsync(file)))
    return room


def test_lines_wait_for_room(tmp_path: Path, disk: list[int], said: list[str]):
    lines = AppendedLines(tmp_path / "a.jsonl")
    lines.write("first")
    disk[0] = 3
    for line in ("second", "third"):
        lines.write(line)
        lines.sync()
    assert (tmp_path / "a.jsonl").read_text() == "first\nsec"
    disk[0] = 10**9
    lines.write("fourth")
    lines.close()
    assert (tmp_path / "a.jsonl").read_text() == "first\nsecond\nthird\nfourth\n"
    assert len(said) == 2 and "No space left" in said[0] and "can be written again" in said[1]


def test_lines_that_wait_are_bounded(tmp_path: Path, disk: list[int], monkeypatch):
    monkeypatch.setattr(best_effort, "MAX_WAITING_BYTES", 100)
    disk[0] = 0
    lines = AppendedLines(tmp_path / "a.jsonl")
    for number in range(50):
        lines.write(f"line {number:04d}")
    disk[0] = 10**9
    lines.close()
    kept = (tmp_path / "a.jsonl").read_text().split("\n")
    assert kept[-2] == "line 0049" and 4 < len(kept) < 12


def test_other_errors_are_not_passed_over():
    with pytest.raises(KeyError), BestEffort("a file"):
        raise KeyError("a fault of the program")


def test_heartbeats(tmp_path: Path, disk: list[int], said: list[str]):
    disk[0] = 0
    heartbeat.open_heartbeat(tmp_path)
    enter("forward", iteration=3)
    share_heartbeat()
    enter("backward")
    disk[0] = 10**9
    enter("updating weights")
    share_heartbeat()
    heartbeat.close_heartbeat()
    beat = read_beat(tmp_path / "rank_00000.json")
    assert beat is not None and beat.place == "step 3, updating weights"
    assert sum("training goes on" in line for line in said) == 2  # the file, and its sync


def test_a_reporter_and_a_folder_that_is_not_there(tmp_path: Path, said: list[str]):
    """The folder of the run is a file until the third line is written."""
    from megatron_croc.training.build import build_reporter

    (tmp_path / "run").write_text("in the way")
    run = tiny_run("finetune", log_dir=str(tmp_path / "run"), tensorboard=True)
    reporter = build_reporter(run, train_iters=9, world_size=1, resumed_at=0)
    for iteration in (1, 2, 3):
        if iteration == 3:
            (tmp_path / "run").unlink()
        reporter._write(iteration, {"iteration": iteration, "loss": 0.5})
    reporter.close()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["iteration"] for row in rows] == [1, 2, 3]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
