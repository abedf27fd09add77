"""One run at a time in a folder, however the last one ended."""

import errno
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_croc.checkpoint import folder_lock
from megatron_croc.checkpoint.folder_lock import LOCK_FILE, STALE, FolderLock, Holder
from megatron_croc.errors import CheckpointError


def leave_lock(folder: Path, *, age: float = 0.0, **changes: object) -> Path:
    """Leave a lock of another run behind: of a living process of this host, unless changed."""
    holder = replace(Holder.of_this_process(), token="another", **changes)  # type: ignore[arg-type]
    path = folder / LOCK_FILE
    path.write_text(json.dumps(vars(holder)) + "\n")
    touched = time.time() - age
    os.utime(path, (touched, touched))
    return path


def is_free(folder: Path) -> bool:
    try:
        FolderLock(folder).release()
    except CheckpointError:
        return False
    return True


def test_a_second_run_is_refused_with_who_holds_it_and_the_way_out(tmp_path: Path):
    folder = tmp_path / "save"
    lock = FolderLock(folder)
    with pytest.raises(CheckpointError) as error:
        FolderLock(folder)
    message = str(error.value)
    for word in (
        str(folder),
        lock.own.host,
        f"pid {os.getpid()}",
        lock.own.since,
        "another folder",
    ):
        assert word in message
    assert "\n" not in message
    lock.release()
    assert list(folder.iterdir()) == []
    assert is_free(folder)


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path: Path, caplog):
    gone = subprocess.Popen(["true"])
    gone.wait()
    leave_lock(tmp_path, pid=gone.pid)
    with caplog.at_level("WARNING", logger="megatron_croc"):
        assert is_free(tmp_path)
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"took over {tmp_path}" in line and f"pid {gone.pid}" in line
    leave_lock(tmp_path, start=1)  # the same pid, given to another process since
    assert is_free(tmp_path)
    leave_lock(tmp_path, age=2 * STALE)  # it lives, so its age says nothing
    assert not is_free(tmp_path)


def test_a_zombie_is_gone(tmp_path: Path):
    child = subprocess.Popen(["true"])
    start = folder_lock._start_of(child.pid) or 0
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    leave_lock(tmp_path, pid=child.pid, start=start)
    assert is_free(tmp_path)
    child.wait()


def test_another_host_is_believed_by_its_touches_alone(tmp_path: Path):
    path = leave_lock(tmp_path, namespace="another host", pid=1, age=STALE - 60)
    with pytest.raises(CheckpointError, match=rf"last sign .* after 300 s, or .* remove {path}\)"):
        FolderLock(tmp_path)
    leave_lock(tmp_path, namespace="another host", pid=1, age=STALE + 60)
    assert is_free(tmp_path)


def test_the_clock_of_this_host_does_not_matter(tmp_path: Path, monkeypatch):
    leave_lock(tmp_path, namespace="another host")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(time, "monotonic", lambda: 4e9)
    assert not is_free(tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "free"),
    [
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),  # two runs in one allocation
        (
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "7-0"},
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "7-0", "TORCHELASTIC_RESTART_COUNT": "1"},
            True,
        ),
        (
            {"TORCHELASTIC_RUN_ID": "ab", "TORCHELASTIC_RESTART_COUNT": "1"},
            {"TORCHELASTIC_RUN_ID": "ab", "TORCHELASTIC_RESTART_COUNT": "2"},
            True,
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none"},  # torchrun without --rdzv-id
            {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"},
            False,
        ),
    ],
)
def test_the_same_job_started_again_is_not_refused(tmp_path: Path, monkeypatch, before, now, free):
    def set_environment(variables: dict[str, str]) -> None:
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID",
                     "TORCHELASTIC_RESTART_COUNT"):  # fmt: skip
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_environment(before)
    leave_lock(tmp_path, namespace="another host")
    set_environment(now)
    assert is_free(tmp_path) == free


def test_a_touch_is_seen_and_a_removed_lock_comes_back(tmp_path: Path):
    lock = FolderLock(tmp_path)
    path = tmp_path / LOCK_FILE
    os.utime(path, (0, 0))
    lock.renew()
    assert path.stat().st_mtime > 1e9
    path.unlink()
    lock.renew()
    assert not is_free(tmp_path)
    lock.release()


def test_a_run_whose_lock_was_taken_over_ends_at_once(tmp_path: Path, monkeypatch, caplog):
    lock = FolderLock(tmp_path)
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    path = leave_lock(tmp_path, host="node9")
    with caplog.at_level("ERROR", logger="megatron_croc"):
        lock.renew()
    assert statuses == [1] and "node9" in caplog.text
    lock.release()
    assert path.exists()  # it is not ours


def test_a_lock_that_another_newcomer_has_made_is_put_back(tmp_path: Path):
    """Two newcomers judge the same old lock; the slower one must not remove the faster one's."""
    gone = Holder.of_this_process()
    leave_lock(tmp_path, host="faster")
    assert not folder_lock._remove(tmp_path / LOCK_FILE, gone)
    assert folder_lock._read(tmp_path / LOCK_FILE).host == "faster"  # type: ignore[union-attr]
    assert [p.name for p in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_torn_lock_does_not_lock_for_ever(tmp_path: Path):
    path = tmp_path / LOCK_FILE
    path.write_text('{"host": ')
    os.utime(path, (1, 1))
    assert is_free(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"--save .*file/x cannot be written \(Not a dir"):
        FolderLock(tmp_path / "file" / "x")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[]", b'{"pid": "x"}'])
def test_an_unreadable_lock_is_taken_over_when_it_is_old(tmp_path: Path, content: bytes):
    path = tmp_path / LOCK_FILE
    path.write_bytes(content)
    os.utime(path, (1.0, 1.0))
    assert is_free(tmp_path)


def test_a_full_disk_is_cleared_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, held = os.fsync, []

    def fsync(handle: int) -> None:
        if not held:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(folder_lock.os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="No space left on device"):
        FolderLock(tmp_path)
    assert not list(tmp_path.iterdir())  # the next start is not refused
    lock = FolderLock(tmp_path, make_room=lambda: held.append((tmp_path / LOCK_FILE).exists()))
    assert held == [True] and not is_free(tmp_path)
    lock.release()
