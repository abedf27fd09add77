"""Order of writes, syncs and renames by which a checkpoint survives a power cut.

A rename is on the disk only once its directory is synced, and must not get there before the
content of what it names.
"""

import os
from pathlib import Path

import pytest

from megatron_croc.checkpoint.manifest import MANIFEST_FILE
from megatron_croc.checkpoint.state import LATEST_FILE
from tests.support.synthetic import tiny_run

Event = tuple[str, Path]


@pytest.fixture
def events(monkeypatch) -> list[Event]:
    """("sync", file or directory) and ("rename", new name), in the order they happen."""
    found: list[Event] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(handle: int) -> None:
        fsync(handle)
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))

    def renamed(move):
        def call(source, target, **kwargs):
            move(source, target, **kwargs)
            found.append(("rename", Path(target)))

        return call

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed(replace))
    monkeypatch.setattr(os, "rename", renamed(rename))
    return found


@pytest.fixture
def saved(tmp_path: Path, pg_collection, events) -> Path:
    """The folder of a checkpoint, after its save was recorded."""
    from megatron_croc.training.build import build_training_state
    from tests.support.checkpoints import save_checkpoint

    run = tiny_run("finetune", save=str(tmp_path.resolve() / "checkpoints"))
    training = build_training_state(run, pg_collection, train_iters=10)
    training.state.iteration = 3
    events.clear()
    return save_checkpoint(run, training.state, training.chunks, training.optimizer, pg_collection)


def place_of(events: list[Event], *event: object, after: int = -1) -> int:
    for place, found in enumerate(events):
        if place > after and found == event:
            return place
    raise AssertionError(f"no {event} behind event {after} of {events}")


def test_a_save_is_durable_step_by_step(saved: Path, events: list[Event]):
    staged, root = saved.with_name(saved.name + ".incomplete"), saved.parent
    manifest = place_of(events, "rename", staged / MANIFEST_FILE)
    names = place_of(events, "sync", staged, after=manifest)
    published = place_of(events, "rename", saved, after=names)
    named = place_of(events, "sync", root, after=published)
    tracker = place_of(events, "rename", root / LATEST_FILE, after=named)
    place_of(events, "sync", root, after=tracker)
    for file, new_name in ((staged / MANIFEST_FILE, manifest), (root / LATEST_FILE, tracker)):
        assert place_of(events, "sync", file.with_name(f".{file.name}.tmp")) < new_name


def unsynced(saved: Path, events: list[Event]) -> set[str]:
    """Files of a checkpoint whose content was not synced before its manifest got its name."""
    staged = saved.with_name(saved.name + ".incomplete")
    manifest = place_of(events, "rename", staged / MANIFEST_FILE)
    synced = {path.name for kind, path in events[:manifest] if kind == "sync"}
    return {
        file.name
        for file in saved.iterdir()
        if not synced & {file.name, f".{file.name}.tmp", f"{file.name}.tmp"}
    }


def test_the_content_of_files_is_synced_before_the_manifest(saved: Path, events: list[Event]):
    assert len(list(saved.iterdir())) >= 7
    assert unsynced(saved, events) == set()


def test_a_failed_digest_leaves_the_tracker(tmp_path: Path, pg_collection, monkeypatch):
    """Nothing is named before everything is written."""
    from megatron_croc.checkpoint import saving
    from megatron_croc.errors import CheckpointError
    from megatron_croc.training.build import build_training_state
    from tests.support.checkpoints import save_checkpoint

    root = tmp_path / "checkpoints"
    run = tiny_run("finetune", save=str(root))
    training = build_training_state(run, pg_collection, train_iters=10)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_manifest", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(run, training.state, training.chunks, training.optimizer, pg_collection)
    assert list(root.iterdir()) == []
