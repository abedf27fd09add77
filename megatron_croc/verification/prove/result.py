"""The result of one stage, as a file that is complete or absent."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_croc.atomic_files import write_atomically
from megatron_croc.file_reading import UnreadableError, build, read_json
from megatron_croc.verification.prove.machine import Machine

Status = Literal["passed", "failed", "timed out", "skipped", "not reached", "interrupted"]

FORM = 1
"""Version of the file."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of a stage on one machine."""

    stage: str
    status: Status
    reason: str = ""
    """Last line of what failed, or why it was left out."""

    seconds: float = 0.0
    date: str = ""
    """Day on which it ran, in UTC."""

    commit: str = ""
    """Commit of the checkout; `+` behind it: with changes."""

    is_small: bool = False
    commands: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    machine: Machine

    def write(self, folder: Path) -> None:
        """Write STAGE.json in `folder`."""
        text = json.dumps({"form": FORM, "result": asdict(self)}, indent=1)
        write_atomically(folder / f"{self.stage}.json", text.encode() + b"\n")


def read_result(file: Path) -> Result | None:
    """The result in a file; None when there is none of this form.

    A damaged file, or one of another version, is as good as no result: the stage runs again.
    """
    try:
        content = read_json(file)
        return build(Result, content.pop("result")) if content.pop("form") == FORM else None
    except (OSError, KeyError, UnreadableError):
        return None
