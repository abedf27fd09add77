"""The form of one entry of the list."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_croc.verification.prove.machine import Machine

Figures = dict[str, Any]
"""Name -> number or text, as they stand in a card."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders, machine and size of a stage's run."""

    folder: Path
    """Folder of this stage; it exists."""

    shared: Path
    """Folder of what a stage leaves for later ones: the data and models of small runs."""

    checkout: Path
    """The repository: benchmarks/ and tests/ are not in the wheel."""

    machine: Machine
    is_small: bool
    """True for a dry run: the same commands at sizes for a CPU."""

    peer: tuple[Path, str] | None = None
    """Checkout of the released Croc, and the interpreter that can import it."""

    def croc(self, *words: object, **environment: str) -> "Command":
        """The command `croc` of this Python."""
        return self.python("-m", "megatron_croc", *words, **environment)

    def python(self, *words: object, **environment: str) -> "Command":
        """This Python."""
        return Command(words=(sys.executable, *map(str, words)), environment=environment)

    def benchmark(self, name: str, *words: object) -> "Command":
        """A script of benchmarks/, which writes to the folder of the stage."""
        return self.python(self.checkout / "benchmarks" / name, *words, "--out", self.folder)

    def torchrun(self, processes: int, *words: object) -> "Command":
        """`croc` on some processes of this machine."""
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", processes)
        return self.python("-m", *launcher, "-m", "megatron_croc", *words)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Words of one process, and what its environment has beside this one's."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    may_fail: bool = False
    """True where its status is itself a finding, and the stage goes on."""


def no_figures(folder: Path) -> Figures:
    """Figures of a stage that only passes or fails."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing that is shown, within a time box."""

    name: str
    shows: str
    """One sentence, as it stands in a card."""

    minutes: float
    """Time box, of 25 minutes in all."""

    commands: Callable[[Place], Sequence[Command]]
    figures: Callable[[Path], Figures] = no_figures
    """Reads the figures from the folder of the stage; may find only a part of them."""

    recipes: tuple[str, ...] = ("tiny",)
    """Recipes in whose cards it stands."""

    missing: Callable[[Place], str | None] = lambda place: None
    """Reason to leave the stage out on this machine, or None."""
