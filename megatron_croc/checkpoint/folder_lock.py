"""Lock of a run's folder: a second run with the same `save` is refused.

    <save>/run.lock    {"host": "node1", "pid": 4711, "start": 8123456, ..., "since": "..."}

The file is made exclusively (also on NFS, where flock is not enough) by rank 0 and touched every
RENEWAL seconds by a thread. A lock that was left behind is taken over:

    same host      its process is gone (pid and start time; also after SIGKILL)
    same job       started again: a later restart of torchrun, a requeue of Slurm
    other host     not touched for STALE seconds, by the clock of the file server alone: the file's
                   time against that of a file written now

A run whose lock was taken over ends at once, without writing anything more.
"""

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_croc.atomic_files import make_directory
from megatron_croc.errors import CheckpointError
from megatron_croc.file_reading import UnreadableError, build, read_json
from megatron_croc.log import get_logger

logger = get_logger(__name__)

LOCK_FILE = "run.lock"

RENEWAL = 20.0
"""Seconds between two touches."""

STALE = 300.0
"""Seconds without a touch after which a lock of another host is taken over."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a folder."""

    token: str
    """Different for every lock."""

    host: str
    """Host name."""

    namespace: str
    """Scope of `pid`: the host since its last start, and the container in it."""

    pid: int
    """Process id there."""

    start: int
    """Start of the process, clock ticks since the host was started."""

    job: str
    """Job of the scheduler or of torchrun; "" for none."""

    restart: int
    """Number of times that the job was restarted."""

    since: str
    """Time of the lock on that host, for people."""

    @classmethod
    def of_this_process(cls) -> "Holder":
        """Describe this process."""
        job, restart = _job()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            namespace=_pid_namespace(),
            pid=os.getpid(),
            start=_start_of(os.getpid()) or 0,
            job=job,
            restart=restart,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def __str__(self) -> str:
        """Text such as "node1, pid 4711, job slurm-12, since 2026-11-25 09:40:12"."""
        job = f", job {self.job}" if self.job else ""
        return f"{self.host}, pid {self.pid}{job}, since {self.since}"

    def is_gone(self, here: "Holder", *, age: float) -> bool:
        """Return True if the process has ended, as far as the process `here` can know.

        Args:
            here: this process.
            age: seconds since the lock was touched.
        """
        if self.job and self.job == here.job and self.restart < here.restart:
            return True
        if self.namespace == here.namespace:
            return _start_of(self.pid) != self.start
        return age >= STALE


def _job() -> tuple[str, int]:
    """Name and restart count of this job, from the environment of Slurm or torchrun.

    A Slurm job may start two runs, so torchrun's own restarts count too: requeues in the thousands.
    """
    environment = os.environ
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    restart = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if slurm := environment.get("SLURM_JOB_ID"):
        return f"slurm-{slurm}", 1000 * int(environment.get("SLURM_RESTART_COUNT", "0")) + restart
    return ("", 0) if run_id == "none" else (f"torchrun-{run_id}", restart)


def _pid_namespace() -> str:
    """Boot id of the kernel and pid namespace; host names may be shared, and outlive a restart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # unknown: no process is looked up


def _start_of(pid: int) -> int | None:
    """Start time of a process, clock ticks since boot; None if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])


class FolderLock:
    """Lock of one folder, and the thread that touches it."""

    def __init__(self, folder: Path, *, make_room: Callable[[], object] | None = None) -> None:
        """Acquire the lock.

        Args:
            folder: folder of the run; created if missing.
            make_room: called if the disk is full, with the folder held; deletes leftovers in it.

        Raises:
            CheckpointError: another run holds it, or the folder cannot be written.
        """
        self.path = folder / LOCK_FILE
        self.own = Holder.of_this_process()
        try:
            make_directory(folder)
            self._acquire(make_room)
        except OSError as error:
            raise CheckpointError(
                f"--save {folder} cannot be written ({error.strerror}); choose another folder"
            ) from error
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="folder lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, if it is still this process's."""
        self._released.set()
        self._thread.join()
        if (holder := _read(self.path)) is not None and holder.token == self.own.token:
            self.path.unlink(missing_ok=True)

    def _acquire(self, make_room: Callable[[], object] | None) -> None:
        while not _create(self.path, self.own, make_room):
            holder = _read(self.path)
            age = _age(self.path)
            if age is None:
                continue  # released just now
            if holder is None:
                if age < RENEWAL:  # being written
                    time.sleep(0.1)
                    continue
                who = "an unknown process"
            else:
                who = str(holder)
                if not holder.is_gone(self.own, age=age):
                    raise CheckpointError(_refusal(self.path, holder, self.own, age))
            if _remove(self.path, holder):
                logger.warning("took over %s from a run that is gone (%s)", self.path.parent, who)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL):
            self.renew()

    def renew(self) -> None:
        """Touch the lock; end this process if it is another one's by now."""
        try:
            if _create(self.path, self.own):
                return  # somebody had removed it
            holder = _read(self.path)
            if holder is not None and holder.token != self.own.token:
                logger.error(
                    "another run has taken over %s (%s): stopping at once, nothing is written",
                    self.path.parent,
                    holder,
                )
                os._exit(1)  # not sys.exit: it would only end this thread, while training goes on
            os.utime(self.path)  # the file server's time
        except OSError:
            pass  # a disk that fails for a moment: the next touch may succeed


def _refusal(path: Path, holder: Holder, here: Holder, age: float) -> str:
    way_out = "save to another folder, or stop that run"
    if holder.namespace != here.namespace:
        way_out += (
            f" (last sign of life {age:.0f} s ago; it counts as dead after {STALE:.0f} s, or once "
            f"you remove {path})"
        )
    return f"--save {path.parent} is in use by another run ({holder}): {way_out}"


def _create(path: Path, holder: Holder, make_room: Callable[[], object] | None = None) -> bool:
    """Make the file exclusively; return False if it exists.

    An empty file holds the folder too, so on a full disk `make_room` may delete what is left there.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        try:
            _write(handle, holder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or make_room is None:
                raise
            make_room()
            _write(handle, holder)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return True


def _write(handle: int, holder: Holder) -> None:
    os.pwrite(handle, (json.dumps(asdict(holder)) + "\n").encode(), 0)
    os.fsync(handle)


def _read(path: Path) -> Holder | None:
    """Read a lock; None if it is missing or cannot be understood."""
    try:
        return build(Holder, read_json(path))
    except (OSError, UnreadableError):
        return None


def _age(path: Path) -> float | None:
    """Seconds since the last touch, by the file server's clock; None if there is no lock."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(path, "rb") as file:  # NFS looks at the server when a file is opened
            touched = os.fstat(file.fileno()).st_mtime
        with open(probe, "wb") as file:  # empty: a full disk has room for a name
            return os.fstat(file.fileno()).st_mtime - touched
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _remove(path: Path, judged: Holder | None) -> bool:
    """Remove the lock that was judged; put another one back that has come in between."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False  # another newcomer was faster
    is_judged = _read(aside) == judged
    if not is_judged:
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return is_judged
