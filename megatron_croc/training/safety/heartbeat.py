"""Where each rank stands, in a small file that outlives the process: heartbeats/rank_00003.json.

    {"rank": 3, "host": "node1", "pid": 4711, "iteration": 12, "phase": "forward",
     "micro_batch": 2, "num_collectives": 71, "since": 1764000000.0}

A process has one heartbeat. It is beaten from deep inside megatron's schedule, so it is found here
like a logger, not passed along. A beat is one pwrite of 256 bytes into the page cache: what it says
last stays readable after SIGKILL.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_croc.log import rank

_BYTES = 256


@dataclass(kw_only=True)
class Beat:
    """Where a rank stands."""

    rank: int
    """Its number."""

    host: str
    """Name of its machine."""

    pid: int
    """Its process there."""

    iteration: int = 0
    """The step under way."""

    phase: str = "starting"
    """What it does in that step; one that waits for all others ends in (the collective)."""

    micro_batch: int | None = None
    """Which micro-batch, in a phase that has one."""

    num_collectives: int = 0
    """Phases so far that wait for all others: every rank goes through the same ones."""

    since: float = 0.0
    """When that began, seconds since 1970."""

    @property
    def waits(self) -> bool:
        """Whether it is in a collective, so that the cause of standing still may be elsewhere."""
        return self.phase.endswith(")")

    @property
    def place(self) -> str:
        """step 12, forward, micro-batch 2."""
        micro_batch = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        return f"step {self.iteration}, {self.phase}{micro_batch}"

    def is_gone(self) -> bool:
        """Whether its process is known to have ended; other machines' processes are not known."""
        if self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state == "Z"


_own = Beat(rank=rank(), host=socket.gethostname(), pid=os.getpid())
_file: int | None = None


def open_heartbeat(folder: Path | None) -> None:
    """Begin to write this process's beats into `folder`; None: keep them in memory."""
    global _own, _file
    close_heartbeat()
    _own = Beat(rank=rank(), host=socket.gethostname(), pid=os.getpid())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        _file = os.open(beat_file(folder, _own.rank), flags, 0o644)
    enter("starting")


def close_heartbeat() -> None:
    """Stop writing; the file keeps the last beat."""
    global _file
    if _file is not None:
        os.close(_file)
        _file = None


def enter(phase: str, *, iteration: int | None = None, micro_batch: int | None = None) -> None:
    """Note that a phase begins; the iteration stays the same where none is given."""
    if iteration is not None:
        _own.iteration = iteration
    _own.num_collectives += phase.endswith(")")
    _own.phase, _own.micro_batch, _own.since = phase, micro_batch, time.time()
    if _file is not None:
        os.pwrite(_file, json.dumps(asdict(_own)).ljust(_BYTES - 1).encode() + b"\n", 0)


def own_beat() -> Beat:
    """This process's heartbeat, live."""
    return _own


def share_heartbeat() -> None:
    """Make the file visible on other machines of a shared file system."""
    if _file is not None:
        os.fsync(_file)


def beat_file(folder: Path, number: int) -> Path:
    """Where rank `number` writes."""
    return folder / f"rank_{number:05d}.json"


def read_heartbeats(folder: Path, world_size: int) -> list[Beat]:
    """The last beats of all ranks that wrote one, in rank order; a torn file counts as none."""
    beats = []
    names = {field.name for field in fields(Beat)}
    for number in range(world_size):
        try:
            content = json.loads(beat_file(folder, number).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and set(content) == names:
            beats.append(Beat(**content))
    return beats
