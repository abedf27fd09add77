"""Options, faults, places in the code, and what every rank is doing."""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

_OWN = os.path.dirname(__file__)
_PASSED_OVER = (_OWN, "/torch/", "contextlib.py", "threading.py", "/concurrent/")


class StrictFault(AssertionError):
    """Something that the real device would have made a hang, a crash or a wrong number."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Delays and checks of the stand-in."""

    send_ms: float = 20.0
    """Delay of every send: its memory is read that much later."""

    copy_ms: float = 20.0
    """Delay of every non-blocking copy to the host."""

    wait_s: float = 60.0
    """Longest wait for another rank before the wait is a fault."""

    rendezvous: bool = True
    """The first use of a communicator waits for the other ranks in it."""

    order: bool = True
    """Collectives of a group are compared between its ranks."""

    marks: bool = True
    """Tensors are marked as the device's or the host's, and their use is watched."""

    raise_faults: bool = True
    """Raise a fault where it is seen; else only keep it."""


@dataclass(kw_only=True)
class Report:
    """Findings of one rank's stand-in."""

    faults: list[str] = field(default_factory=list)

    host_reads: Counter[str] = field(default_factory=Counter)
    """`operation at file function` of everything that kept the host waiting for the device."""

    synchronizes: Counter[str] = field(default_factory=Counter)
    """Places (file:line) that called torch.cuda.synchronize."""

    num_sends: int = 0

    num_collectives: int = 0
    """Collectives that were compared."""


class Job:
    """One rank's side of a strict job."""

    def __init__(self, options: Options) -> None:
        """Nothing has happened yet."""
        self.options = options
        self.report = Report()
        self.rank = int(os.environ.get("RANK", "0"))
        self.raised: set[str] = set()
        self._doing: str | None = None
        self._store: Any = None
        self._lock = threading.Lock()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            threading.Thread(target=self._publish, daemon=True).start()

    def fault(self, message: str, *, may_raise: bool = True) -> None:
        """Keep a fault, and raise it unless this thread cannot or the options say no."""
        message = f"rank {self.rank}: {message}"
        if message not in self.report.faults:
            self.report.faults.append(message)
        if may_raise:
            self.raise_faults()

    def raise_faults(self) -> None:
        """Raise the first fault that was not raised yet."""
        if self.options.raise_faults:
            for message in self.report.faults:
                if message not in self.raised:
                    self.raised.add(message)
                    raise StrictFault(message)

    @property
    def store(self) -> Any:
        """This rank's own connection to the job's store; opened at first use."""
        with self._lock:
            if self._store is None:
                self._store = _connect()
        return self._store

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Let the other ranks know of the block, should they wait for this one."""
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._doing = before

    def others(self, ranks: list[int]) -> str:
        """Each of these ranks with what it was doing half a second ago."""
        time.sleep(0.6)
        seen = {rank: self.read(f"strict/doing/{rank}") for rank in ranks if rank != self.rank}
        return "; ".join(f"rank {rank}: {text or 'not to be seen'}" for rank, text in seen.items())

    def read(self, key: str) -> str | None:
        """An entry of the store; None if it is not there, or the store's rank has ended."""
        try:
            return self.store.get(key).decode() if self.store.check([key]) else None
        except RuntimeError:
            return None

    def wait(self, work: Any, what: str, ranks: list[int]) -> Any:
        """work.wait() within the time, or a fault that names both sides."""
        with self.doing(what):
            try:
                return work.wait(timedelta(seconds=self.options.wait_s))
            except RuntimeError as error:
                if "imed out" not in str(error) and "imeout" not in str(error):
                    raise
                message = f"{what} waited {self.options.wait_s:g} s; {self.others(ranks)}"
                self.fault(message)
                raise

    def _publish(self) -> None:
        store, main = _connect(), threading.main_thread().ident
        before = None
        while True:
            text = self._doing
            if text is None and main is not None:
                text = f"at {place(sys._current_frames().get(main))}"
            try:
                if text != before:
                    store.set(f"strict/doing/{self.rank}", text)
            except RuntimeError:
                return  # the rank that holds the store has ended
            before = text
            time.sleep(0.2)


def _connect() -> Any:
    port = int(os.environ["MASTER_PORT"])
    return dist.TCPStore(os.environ["MASTER_ADDR"], port, None, False, wait_for_workers=False)


def describe(tensor: Any) -> str:
    """Shape and dtype: [3, 4] float32."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if not any(part in frame.f_code.co_filename for part in _PASSED_OVER):
            yield frame
        frame = frame.f_back


def _short(path: str) -> str:
    for root in ("megatron_croc", "megatron", "tests", "tools"):
        if f"/{root}/" in path:
            return f"{root}/{path.rsplit(f'/{root}/', 1)[1]}"
    return os.path.basename(path)


def place(frame: FrameType | None = None) -> str:
    """file:line of the first caller outside torch and the stand-in, and of the one in our code."""
    found: list[str] = []
    for caller in _callers(frame or sys._getframe(1)):
        name = _short(caller.f_code.co_filename)
        if not found or not name.startswith("megatron/"):
            found.append(f"{name}:{caller.f_lineno}")
        if not name.startswith("megatron/"):
            break
    return " < ".join(found)


def function() -> str:
    """File and function of the caller as `place` has it; edits above it leave it the same."""
    for caller in _callers(sys._getframe(1)):
        return f"{_short(caller.f_code.co_filename)} {caller.f_code.co_name}"
    return "?"


def is_object_collective() -> bool:
    """True when an object collective of torch calls; it moves objects to the device itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "object" in frame.f_code.co_name and "/torch/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
