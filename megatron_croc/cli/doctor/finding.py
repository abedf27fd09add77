"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """Something that was looked at."""

    level: Level
    """ok; note: slower than it could be; warning: probably not meant; error: training will fail."""

    subject: str
    """What was looked at, in a word or two."""

    text: str
    """What was found."""

    remedy: str = ""
    """The way out, when there is something to mend."""

    def __str__(self) -> str:
        """One line of the report."""
        mark = {"ok": " ", "note": "-", "warning": "!", "error": "X"}[self.level]
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{mark} {self.subject:<22} {self.text}{remedy}"
