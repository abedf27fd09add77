"""The order that the parent gives to the child process of one rank, as a JSON file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_croc.config.base import apply_changes, changes_from_tree, raise_faults, to_tree
from megatron_croc.config.run import RunConfig

RowKind = Literal["data", "longest", "mean", "drawn"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Origin of the micro-batches."""

    kind: RowKind
    """`data`: the run's own plan; `longest`: what `croc check` expects at most; `mean`: equal
    ones of mean samples; `drawn`: drawn from the distribution of sample lengths."""

    text_tokens: float = 200.0
    text_spread: float = 0.5
    images: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's rehearsal."""

    settings: dict[str, Any]
    """All settings of the run, by section."""

    rank: int
    world_size: int
    gpu: str
    """Name in the planner's table."""

    rows: Rows
    stands_for: list[int] = field(default_factory=list)
    """Global ranks of its class."""

    step_only: bool = False
    """End after the training step: no validation, no saving."""

    def run(self) -> RunConfig:
        """Build the run of the settings."""
        faults: list[str] = []
        run = RunConfig()
        apply_changes(run, changes_from_tree(RunConfig, self.settings, faults, source="job"))
        raise_faults(faults)
        return run

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read the file of `write`."""
        tree = json.loads(path.read_text())
        return cls(**{**tree, "rows": Rows(**tree["rows"])})


def settings_of(run: RunConfig) -> dict[str, Any]:
    """Settings for a job."""
    return to_tree(run)
