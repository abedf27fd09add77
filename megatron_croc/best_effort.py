"""Writes beside training: a full or broken disk costs what they write, and never ends the run."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_croc.atomic_files import sync_directory
from megatron_croc.errors import first_line
from megatron_croc.log import get_logger

logger = get_logger(__name__)

MAX_WAITING_BYTES = 16 << 20
"""Most bytes of lines that wait for room on the disk."""


class BestEffort:
    """Context manager whose body may fail: one warning at the first failure, one line at its end.

    The body runs at every use, so each use tries again.
    """

    def __init__(self, what: str, *, errors: tuple[type[Exception], ...] = (OSError,)) -> None:
        """Take the name of the thing that is written, and the errors that are passed over."""
        self.what, self.errors = what, errors
        self.is_failing = False

    def __enter__(self) -> Self:
        """Begin an attempt."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        """Pass over an expected error."""
        if error is None:
            if self.is_failing:
                logger.info("%s can be written again", self.what)
            self.is_failing = False
            return False
        if not isinstance(error, self.errors):
            return False
        if not self.is_failing:
            said = first_line(error)
            logger.warning("%s cannot be written (%s); training goes on", self.what, said)
        self.is_failing = True
        return True


class AppendedLines:
    """Text file that grows by whole lines; lines that do not fit on the disk are written later."""

    def __init__(self, path: Path, *, prepare: Callable[[], object] | None = None) -> None:
        """Take the file; it is opened at the first line.

        Args:
            path: the file.
            prepare: done now or, if that fails, before the first line is written.
        """
        self._path, self._prepare = path, prepare
        self._file: int | None = None
        self._waiting = b""
        self._effort = BestEffort(str(path))
        with self._effort:
            self._be_prepared()

    def write(self, line: str) -> None:
        """Append one line, after those that could not be written before."""
        self._waiting += line.encode() + b"\n"
        with self._effort:
            self._flush()
        if len(self._waiting) > MAX_WAITING_BYTES:
            # The first line may be written in part already; without its end it is set aside later.
            kept = self._waiting[-MAX_WAITING_BYTES // 2 :]
            self._waiting = b"\n" + kept.partition(b"\n")[2]

    def sync(self) -> None:
        """Flush the file to disk, for a checkpoint that will count its lines as written."""
        with self._effort:
            self._flush()
            if self._file is not None:
                os.fsync(self._file)
                sync_directory(self._path.parent)  # the file may be new

    def close(self) -> None:
        """Write the rest, and close the file."""
        with self._effort:
            self._flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _be_prepared(self) -> None:
        if self._prepare is not None:
            self._prepare()
            self._prepare = None

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._be_prepared()
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o644)
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]
