"""The current phase of each rank, in a small file that outlives the process.

    heartbeats/rank_00003.json
    {"rank": 3, "host": "node1", "pid": 4711, "iteration": 12, "phase": "summing gradients",
     "collective": "reduce-scatter", "micro_batch": null, "num_collectives": 71, "since": 1764.0,
     "monotonic": 52.5}

A process has one heartbeat, kept in this module: `enter` is called from inside megatron's schedule,
where it cannot be passed as an argument (docs/design.md, "State that belongs to the whole
process"). Each call is one pwrite of 512 bytes into the page cache, so the last phase can be read
even after SIGKILL.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_croc.atomic_files import sync_directory
from megatron_croc.best_effort import BestEffort
from megatron_croc.errors import printable
from megatron_croc.file_reading import UnreadableError, build, read_json
from megatron_croc.log import rank

_BYTES = 512
"""Size of a file. The longest line, with a host name of 64 characters, is about 300 bytes."""


@dataclass(kw_only=True)
class Beat:
    """The phase of one rank."""

    rank: int
    """Global rank."""

    host: str
    """Host name."""

    pid: int
    """Process id on that host."""

    iteration: int = 0
    """Current step."""

    phase: str = "starting"
    """Current phase of the step."""

    collective: str | None = None
    """Collective in which the phase waits for the other ranks; None: it waits for nobody."""

    micro_batch: int | None = None
    """Current micro-batch; None in phases without one."""

    num_collectives: int = 0
    """Phases with a collective so far; all ranks go through the same ones in the same order."""

    since: float = 0.0
    """Start of the phase, seconds since 1970."""

    monotonic: float = 0.0
    """Start of the phase on the clock of its host that nobody can set, seconds."""

    @property
    def waits(self) -> bool:
        """True when the rank waits in a collective, where another rank may be the cause."""
        return self.collective is not None

    @property
    def place(self) -> str:
        """Text such as "step 12, summing gradients (reduce-scatter)"."""
        collective = "" if self.collective is None else f" ({self.collective})"
        micro_batch = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        return f"step {self.iteration}, {self.phase}{collective}{micro_batch}"

    def age(self) -> float:
        """Seconds since the start of the phase; by the monotonic clock on this host."""
        if self.host == socket.gethostname():
            return time.monotonic() - self.monotonic
        return time.time() - self.since

    def is_gone(self) -> bool:
        """True when the process has ended. Always False for processes of other hosts."""
        if self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state == "Z"


_own = Beat(rank=rank(), host=socket.gethostname(), pid=os.getpid())
_file: int | None = None
_folder: Path | None = None
_num_phases = 0
_writing, _sharing = BestEffort("the heartbeat"), BestEffort("the heartbeat on disk")


def open_heartbeat(folder: Path | None) -> None:
    """Start writing this process's phases to `folder`; None: keep them in memory."""
    global _own, _folder
    close_heartbeat()
    _own = Beat(rank=rank(), host=socket.gethostname(), pid=os.getpid())
    _folder = folder
    _open_file()
    enter("starting")


def _open_file() -> None:
    global _file
    if _folder is not None:
        with _writing:
            _folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            _file = os.open(beat_file(_folder, _own.rank), flags, 0o644)


def close_heartbeat() -> None:
    """Stop writing; the file keeps the last phase."""
    global _file
    if _file is not None:
        os.close(_file)
        _file = None


def enter(
    phase: str,
    *,
    collective: str | None = None,
    iteration: int | None = None,
    micro_batch: int | None = None,
) -> None:
    """Record the start of a phase.

    Args:
        phase: short text, for example "forward".
        collective: collective in which the phase waits for all other ranks; None: it does not.
        iteration: current step; None: the same as before.
        micro_batch: current micro-batch; None in phases without one.
    """
    global _num_phases
    if iteration is not None:
        _own.iteration = iteration
    _own.num_collectives += collective is not None
    _own.phase, _own.collective, _own.micro_batch = phase, collective, micro_batch
    _own.since, _own.monotonic = time.time(), time.monotonic()
    _num_phases += 1
    if _file is not None:
        with _writing:
            os.pwrite(_file, json.dumps(asdict(_own)).ljust(_BYTES - 1).encode() + b"\n", 0)


def num_phases() -> int:
    """Number of phases this process has entered; it changes exactly when a new one starts."""
    return _num_phases


def own_beat() -> Beat:
    """This process's heartbeat; the object changes with every phase."""
    return _own


def share_heartbeat() -> None:
    """Flush the file to disk: other hosts of a shared file system see it, and it outlives a power
    cut."""
    if _file is None:
        _open_file()  # there may be room again
    if _file is not None and _folder is not None:
        with _sharing:
            os.fsync(_file)
            sync_directory(_folder)
            sync_directory(_folder.parent)


def beat_file(folder: Path, number: int) -> Path:
    """Path of the heartbeat of rank `number`."""
    return folder / f"rank_{number:05d}.json"


def read_beat(path: Path) -> Beat | None:
    """Read one heartbeat; None if the file is missing or damaged."""
    try:
        beat = build(Beat, read_json(path, most=8 * _BYTES))
    except (OSError, UnreadableError):
        return None
    beat.host, beat.phase = printable(beat.host), printable(beat.phase)
    beat.collective = None if beat.collective is None else printable(beat.collective)
    return beat


def read_heartbeats(folder: Path, world_size: int) -> list[Beat]:
    """Last heartbeats in rank order; ranks with a missing or damaged file are left out."""
    beats = (read_beat(beat_file(folder, number)) for number in range(world_size))
    return [beat for beat in beats if beat is not None]
