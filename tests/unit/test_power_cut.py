"""Files beside checkpoints after a power cut at any moment: metrics, shards, exports."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_croc.atomic_files import write_atomically
from megatron_croc.best_effort import AppendedLines
from megatron_croc.convert.staging import staged_directory
from megatron_croc.data.store.manifest import read_manifest, verify_shards
from megatron_croc.data.store.shard_writer import (
    LengthsInfo,
    ShardWriter,
    add_lengths,
    sha256_of,
    write_manifest,
)
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError
from megatron_croc.training.reporting.metrics_log import drop_undone_steps
from megatron_croc.training.safety.heartbeat import (
    beat_file,
    close_heartbeat,
    enter,
    open_heartbeat,
    read_heartbeats,
    share_heartbeat,
)
from tests.support.power_cut import Recorder, State


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return (tmp_path / "disk").resolve()


def after(recorder: Recorder, tmp_path: Path, at_least: int) -> Iterator[tuple[State, Path]]:
    """Every state of the disk, in a folder of its own."""
    states = recorder.states()
    assert len(states) >= at_least
    for number, state in enumerate(states):
        folder = state.write_to(tmp_path / "after" / str(number))
        yield state, folder
        shutil.rmtree(folder)


def test_a_file_that_is_replaced_is_old_or_new(disk: Path, tmp_path: Path):
    (disk / "a.json").write_bytes(b"old and whole")
    with Recorder(disk) as recorder:
        write_atomically(disk / "a.json", b"new, and longer than before")
        recorder.mark("new")
    for state, folder in after(recorder, tmp_path, 5):
        content = (folder / "a.json").read_bytes()
        assert content == b"new, and longer than before" or (
            content == b"old and whole" and not recorder.promised(state)
        )


def rows(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_metrics_are_one_clean_curve_up_to_the_checkpoint(disk: Path, tmp_path: Path):
    """Synced at a checkpoint of step 3; later lines may be lost, those before it may not."""
    with Recorder(disk) as recorder:
        lines = AppendedLines(disk / "metrics.jsonl")
        for step in range(1, 6):
            lines.write(json.dumps({"iteration": step, "loss": 1.0}))
            if step == 3:
                lines.sync()
                recorder.mark(3)
        lines.close()
    for state, folder in after(recorder, tmp_path, 6):
        done = max(recorder.promised(state), default=0)
        drop_undone_steps(folder, done)
        again = AppendedLines(folder / "metrics.jsonl")
        for step in range(done + 1, 6):
            again.write(json.dumps({"iteration": step, "loss": 1.0}))
        again.close()
        assert rows(folder / "metrics.jsonl") == [1, 2, 3, 4, 5], state.last


def test_superseded_metrics_are_never_lost(disk: Path, tmp_path: Path):
    text = "".join(json.dumps({"iteration": step}) + "\n" for step in range(1, 6))
    (disk / "metrics.jsonl").write_text(text)
    with Recorder(disk) as recorder:
        drop_undone_steps(disk, 3)
    for state, folder in after(recorder, tmp_path, 5):
        drop_undone_steps(folder, 3)
        assert rows(folder / "metrics.jsonl") == [1, 2, 3], state.last
        kept = (folder / "metrics.superseded.jsonl").read_text()
        assert '{"iteration": 4}' in kept and '{"iteration": 5}' in kept


def test_a_dataset_is_finished_or_not_there(disk: Path, tmp_path: Path):
    folder = disk / "sets" / "a"
    folder.parent.mkdir()
    with Recorder(disk) as recorder:
        folder.mkdir()
        infos = []
        for shard in range(2):
            with ShardWriter(folder, shard) as writer:
                writer.add({"caption": "x"}, [("jpg", b"image")])
            assert writer.info is not None
            infos.append(writer.info)
        write_manifest(folder, infos)
        recorder.mark("dataset")
        table = folder / "lengths-x.npy"
        write_atomically(table, b"a table")
        info = LengthsInfo(
            file=table.name,
            sha256=sha256_of(table),
            tokenizer_sha256="x",
            tokenizer_model="x",
            conversation_template="v1",
        )
        add_lengths(folder, info)
        recorder.mark("lengths")
    for state, top in after(recorder, tmp_path, 35):
        found = top / "sets" / "a"
        try:
            manifest = read_manifest(found)
        except DataError as error:
            assert "no finished dataset" in str(error) or "is missing" in str(error)
            assert "dataset" not in recorder.promised(state), state.last
            continue
        verify_shards(found)
        assert [ShardedDataset(found).read(n).image_bytes for n in range(2)] == [[b"image"]] * 2
        assert manifest.lengths or "lengths" not in recorder.promised(state)


def test_an_export_is_complete_or_not_there(disk: Path, tmp_path: Path):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "code/model.py": b"pass"}
    with Recorder(disk) as recorder:
        with staged_directory(disk / "out" / "export") as staged:
            (staged / "code").mkdir()
            for name, content in files.items():
                (staged / name).write_bytes(content)
        recorder.mark("export")
    for state, top in after(recorder, tmp_path, 20):
        found = top / "out" / "export"
        assert found.is_dir() or not recorder.promised(state), state.last
        if found.is_dir():
            assert {name: (found / name).read_bytes() for name in files} == files


def test_heartbeats(disk: Path, tmp_path: Path):
    """A heartbeat is one that was written, or none; one that was shared is not lost."""
    folder, written = disk / "heartbeats", set()
    with Recorder(disk) as recorder:
        for first in (1, 11):  # the second run finds the files of the first, and empties them
            recorder.mark(None)
            open_heartbeat(folder)
            for iteration in range(first, first + 5):
                written.add(beat_file(folder, 0).read_bytes().strip())
                enter("forward", iteration=iteration, micro_batch=iteration % 3)
                written.add(beat_file(folder, 0).read_bytes().strip())
                recorder.look(f"heartbeat {iteration}")
                if iteration % 5 in (2, 4):
                    share_heartbeat()
                    recorder.mark(iteration)
            close_heartbeat()
    num_lost = 0
    for state, top in after(recorder, tmp_path, 15):
        beats = read_heartbeats(top / "heartbeats", 1)
        promised = [None, *recorder.promised(state)][-1]
        if beats:
            assert beat_file(top / "heartbeats", 0).read_bytes().strip() in written
        if promised is not None:
            assert beats and beats[0].iteration >= promised, state.last
        num_lost += not beats
        open_heartbeat(top / "heartbeats")  # the next run starts on every state
        close_heartbeat()
    assert num_lost


def test_the_harness_overwrites_by_sectors(disk: Path):
    (disk / "a").write_bytes(b"o" * 1536)
    with Recorder(disk) as recorder:
        file = os.open(disk / "a", os.O_WRONLY)
        os.pwrite(file, b"n" * 1536, 0)
        os.close(file)
    contents = {state.tree["a"] for state in recorder.states()}
    assert contents == {b"o" * 1536, b"n" * 1536, b"n" * 512 + b"o" * 1024}


def test_the_harness_finds_what_is_not_flushed(disk: Path, tmp_path: Path):
    """A file that is written and renamed, without a sync of either, may be empty or not there."""
    with Recorder(disk) as recorder:
        (disk / ".a").write_bytes(b"content")
        (disk / ".a").rename(disk / "a")
        recorder.mark("a")
    promised = [state for state in recorder.states() if recorder.promised(state)]
    contents = {state.tree.get("a") for state in promised}
    assert contents == {None, b"", b"con", b"content"}
