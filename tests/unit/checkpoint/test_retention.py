"""Removal of old checkpoints, each as a whole."""

import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from megatron_croc.checkpoint.manifest import MANIFEST_FILE, write_manifest
from megatron_croc.checkpoint.publishing import sweep
from megatron_croc.checkpoint.retention import being_read, prune, retire, superfluous
from megatron_croc.checkpoint.state import iteration_folder


def make(root: Path, *iterations: int) -> list[Path]:
    for iteration in iterations:
        folder = iteration_folder(root, iteration)
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"1")
        write_manifest(folder)
    return [iteration_folder(root, n) for n in iterations]


def names(folders: list[Path]) -> list[int]:
    return [int(folder.name.removeprefix("iter_")) for folder in folders]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "goes"),
    [
        (None, None, []),
        (1, None, [100, 200, 250, 300]),
        (2, None, [100, 200, 250]),
        (9, None, []),
        (1, 200, [100, 250, 300]),
        (2, 100, [250]),
    ],
)
def test_what_goes(tmp_path: Path, keep_last, keep_every, goes):
    *_, latest = make(tmp_path, 100, 200, 250, 300, 400)
    found = superfluous(latest, keep_last=keep_last, keep_every=keep_every)
    assert names(found) == goes


def test_later_and_unfinished_ones_stay_and_do_not_count(tmp_path: Path):
    """A run set back to 200 keeps what is later; an unfinished folder is not a kept checkpoint."""
    _, good, torn, latest, later = make(tmp_path, 50, 100, 150, 200, 300)
    (torn / MANIFEST_FILE).unlink()
    assert names(superfluous(latest, keep_last=2, keep_every=None)) == [50]
    assert names(superfluous(latest, keep_last=1, keep_every=None)) == [50, 100]
    (away,) = prune(latest, keep_last=2, keep_every=None)
    assert away.name == "iter_0000050.removed"
    assert all(folder.exists() for folder in (good, torn, latest, later))


def test_a_folder_of_another_name_is_left_alone(tmp_path: Path):
    (latest,) = make(tmp_path, 200)
    os.rename(*make(tmp_path, 100), tmp_path / "iter_best")
    (tmp_path / "iter_0000001.incomplete.kept").mkdir()
    assert prune(latest, keep_last=1, keep_every=None) == []
    sweep(tmp_path)
    left = ["iter_0000001.incomplete.kept", "iter_0000200", "iter_best"]
    assert sorted(os.listdir(tmp_path)) == left


def test_sweep_takes_what_killed_runs_left(tmp_path: Path):
    (latest,) = make(tmp_path, 200)
    for name in ("iter_0000300.incomplete", "iter_0000100.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"1")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == [latest.name]
    sweep(tmp_path / "nowhere")


def hold(folder: Path, ready, release) -> None:
    with being_read(folder):
        ready.set()
        release.wait(60)


def test_one_that_another_process_reads_is_kept(tmp_path: Path):
    (folder,) = make(tmp_path, 100)
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    reader = context.Process(target=hold, args=(folder, ready, release))
    reader.start()
    assert ready.wait(60)
    assert retire(folder) is None and folder.exists()
    release.set()
    reader.join()
    away = retire(folder)
    assert away is not None and away.exists() and not folder.exists()


def test_a_disk_without_locks_keeps_nobody_from_working(tmp_path: Path, monkeypatch):
    def refuse(handle: int, kind: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (folder,) = make(tmp_path, 100)
    with being_read(folder):
        assert folder.exists()
    assert retire(folder) is not None
