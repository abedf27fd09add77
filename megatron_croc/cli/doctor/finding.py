"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """Result of one examination."""

    level: Level
    """ok; note: slower than it could be; warning: probably a mistake; error: training will fail."""

    subject: str
    """Name of the examined thing, one or two words."""

    text: str
    """Description."""

    remedy: str = ""
    """The way out, if there is a problem."""

    def __str__(self) -> str:
        """One line of the report."""
        mark = {"ok": " ", "note": "-", "warning": "!", "error": "X"}[self.level]
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{mark} {self.subject:<22} {self.text}{remedy}"
