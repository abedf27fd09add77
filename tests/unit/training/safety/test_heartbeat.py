import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_croc.training.safety import heartbeat, watchdog
from megatron_croc.training.safety.heartbeat import (
    Beat,
    beat_file,
    enter,
    own_beat,
    read_heartbeats,
)


@pytest.fixture
def folder(tmp_path: Path):
    heartbeat.open_heartbeat(tmp_path)
    yield tmp_path
    heartbeat.close_heartbeat()


def test_the_file_says_where_the_rank_stands(folder: Path):
    started = time.time()
    enter("forward", iteration=7, micro_batch=2)
    (beat,) = read_heartbeats(folder, 3)
    assert beat == own_beat()
    assert beat.place == "step 7, forward, micro-batch 2"
    assert beat.pid == os.getpid() and started <= beat.since <= time.time()
    before = own_beat().num_collectives
    enter("summing gradients", collective="reduce-scatter")
    assert own_beat().num_collectives == before + 1 and own_beat().waits
    assert own_beat().place == "step 7, summing gradients (reduce-scatter)"
    enter("saving")  # shorter: nothing of the line before is left
    (beat,) = read_heartbeats(folder, 3)
    assert beat.place == "step 7, saving" and beat.num_collectives == before + 1
    assert not beat.waits
    assert len(beat_file(folder, 0).read_bytes()) == 512


def test_a_bracket_in_the_text_is_no_collective(folder: Path):
    before = own_beat().num_collectives
    enter("reading data (shard 3)")
    assert not own_beat().waits and own_beat().num_collectives == before


def test_the_longest_line_leaves_nothing_behind(tmp_path: Path, monkeypatch):
    """A line longer than the file would leave its end behind a shorter next line."""
    monkeypatch.setattr(heartbeat.socket, "gethostname", lambda: "n" * 64)
    monkeypatch.setenv("RANK", "16384")
    heartbeat.open_heartbeat(tmp_path)
    enter(
        "agreeing on whether to stop",
        collective="reduce-scatter",
        iteration=10_000_000,
        micro_batch=1_000_000,
    )
    enter("forward")
    heartbeat.close_heartbeat()
    (beat,) = read_heartbeats(tmp_path, 16385)
    assert beat.phase == "forward" and beat.rank == 16384


def test_a_torn_file_is_no_heartbeat(folder: Path):
    beat_file(folder, 1).write_text('{"rank": 1, "ho')
    beat_file(folder, 2).write_text("[]")
    assert [beat.rank for beat in read_heartbeats(folder, 4)] == [0]


def write(folder: Path, number: int, **changes: object) -> None:
    """Write the heartbeat of another rank."""
    import json
    from dataclasses import asdict

    beat = replace(own_beat(), rank=number, **changes)
    beat.monotonic += beat.since - own_beat().since
    beat_file(folder, number).write_text(json.dumps(asdict(beat)))


def test_the_rank_that_is_waited_for_is_named(folder: Path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    enter("summing gradients", collective="reduce-scatter", iteration=5)
    now, waited = own_beat().since, own_beat().num_collectives
    write(folder, 1, since=now + 0.1)  # waits for the same
    assert watchdog.describe_lost_ranks(folder) is None
    write(folder, 1, phase="sharing data", collective="broadcast", num_collectives=waited - 1)
    told = watchdog.describe_lost_ranks(folder)  # in an earlier collective
    assert told is not None and told.startswith("rank 1 (")
    write(folder, 2, iteration=4, phase="forward", collective=None, micro_batch=3, since=now - 9)
    told = watchdog.describe_lost_ranks(folder)
    assert told is not None and len(told.splitlines()) == 1
    assert told.startswith("rank 2 (") and "step 4, forward, micro-batch 3" in told
    assert "has not moved for 9." in told and "rank_00002.stack" in told
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write(folder, 3, phase="updating weights", since=now, pid=ended.pid)
    told = watchdog.describe_lost_ranks(folder)  # a dead rank explains the ones that wait
    assert told is not None and told.startswith("rank 3 (") and "is gone" in told
    assert "rank 2" not in told
    enter("backward", micro_batch=0)  # this rank may itself be the cause
    write(folder, 3, phase="forward", since=own_beat().since + 1)
    write(folder, 2, phase="forward", since=own_beat().since + 1)
    assert watchdog.describe_lost_ranks(folder) is None
    assert watchdog.describe_lost_ranks(None) is None


def test_processes_of_other_machines_are_not_judged():
    beat = Beat(rank=0, host="elsewhere", pid=2**22 + 1)
    assert not beat.is_gone()
    assert replace(beat, host=own_beat().host).is_gone()
