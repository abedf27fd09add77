"""State of a run in a checkpoint, besides weights and optimizer."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_croc.atomic_files import write_atomically
from megatron_croc.errors import CheckpointError, first_line

if TYPE_CHECKING:  # it imports torch, and croc check reads states without it
    from megatron_croc.data.order.row_plan import OrderState

STATE_FILE = "train_state.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"

_WRITE_ONE = f"write the name of a whole checkpoint into {LATEST_FILE}"
"""Way out of a damaged tracker, for messages."""

_MAX_DIGITS, _MAX_NAME = 18, 255
"""Most characters of an iteration and of a folder's name."""


@dataclass(kw_only=True)
class TrainState:
    """Progress of a run."""

    iteration: int = 0
    """Number of optimizer steps done."""

    consumed_samples: int = 0
    """Number of samples done, over all sources and epochs."""

    stage: str = ""
    """Training stage of the run."""

    run_id: str = ""
    """Id of the run (run_folder.py); empty in a checkpoint that was made before there were ids."""

    num_skipped: int = 0
    """Number of steps skipped because of an anomaly in loss or gradient."""

    skipped_in_a_row: int = 0
    """Number of steps skipped in a row up to now."""

    recent_losses: list[float] = field(default_factory=list)
    """Recent losses that spikes are found from; empty without spike detection."""

    order: "OrderState | None" = None
    """Position in the order of samples; None before the first step."""

    def resume_point(self) -> "OrderState | None":
        """Position in the order of samples to continue from; None at the start of a run.

        Raises:
            CheckpointError: the checkpoint has no such position.
        """
        if self.iteration and self.order is None:
            raise CheckpointError(
                f"the checkpoint of iteration {self.iteration} does not name its position in the "
                f'order of samples (no "order" in {STATE_FILE}): start a new run from it with '
                "--pretrained-checkpoint"
            )
        return self.order

    def advance(self, num_samples: int, order: "OrderState | None") -> None:
        """Count a step of `num_samples`; `order` is the position after it."""
        self.iteration += 1
        self.consumed_samples += num_samples
        self.order = order

    def progress(self) -> dict[str, float]:
        """Counters of samples done, in total and by source."""
        counters: dict[str, float] = {"consumed_samples": self.consumed_samples}
        if self.order is not None:
            for name, samples in zip(self.order.sources, self.order.consumed, strict=True):
                counters[f"source_samples/{name}"] = samples
                counters[f"source_epochs/{name}"] = self.order.epochs[name]
        return counters

    def save(self, folder: Path) -> None:
        """Write the state to a checkpoint folder, and flush it to disk."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        write_atomically(folder / STATE_FILE, text.encode())

    @classmethod
    def load(cls, folder: Path) -> "TrainState":
        """Read the state of a checkpoint folder.

        Raises:
            CheckpointError: the file is missing or not readable.
        """
        path = folder / STATE_FILE
        try:
            tree = json.loads(path.read_text())
            if tree.get("order") is not None:
                from megatron_croc.data.order.row_plan import OrderState

                tree["order"] = OrderState.from_tree(tree["order"])
            return cls(**tree)
        except (AttributeError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not readable as a training state ({error}); "
                "point --load at a folder that this program wrote"
            ) from error


def iteration_folder(root: Path, iteration: int) -> Path:
    """Path of a checkpoint: `iter_0000100` in the folder of checkpoints."""
    return root / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """Iteration in a folder's name; None if it is not the name of a checkpoint."""
    digits = folder.name.removeprefix("iter_")
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= _MAX_DIGITS
    return int(digits) if folder.name.startswith("iter_") and is_number else None


def resume_candidates(root: str | Path) -> list[Path]:
    """List the checkpoints that a run may resume from: the latest, then older ones.

    If `root` is a checkpoint itself, it is the only candidate. Without a tracker file (the run was
    killed while it published its first checkpoint), every checkpoint is a candidate.
    """
    root = Path(root)
    if (root / STATE_FILE).exists():
        return [root]
    there = {n: folder for folder in root.glob("iter_*") if (n := iteration_of(folder)) is not None}
    folders = [there[n] for n in sorted(there, reverse=True)]
    if (latest := tracked_checkpoint(root)) is None:
        return folders
    last = iteration_of(latest)
    return [latest, *(f for f in folders if last is None or iteration_of(f) < last)]  # type: ignore[operator]


def latest_checkpoint(root: str | Path) -> Path | None:
    """Return `root` if it is a checkpoint, else the latest checkpoint in it; None without one.

    Raises:
        CheckpointError: the tracker file names a missing checkpoint.
    """
    root = Path(root)
    if (root / STATE_FILE).exists():
        return root
    folder = tracked_checkpoint(root)
    if folder is not None and not (folder / STATE_FILE).exists():
        raise CheckpointError(
            f"{root / LATEST_FILE} names {folder.name}, which is not a complete checkpoint; "
            f"write the name of one that is into {LATEST_FILE}"
        )
    return folder


def tracked_checkpoint(root: Path) -> Path | None:
    """Path of the checkpoint that the tracker file names; None without a tracker.

    Raises:
        CheckpointError: the tracker cannot be read, or does not hold a name.
    """
    tracker = root / LATEST_FILE
    try:
        with tracker.open("rb") as file:
            word = file.read(_MAX_NAME + 1).decode("ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{tracker} cannot be read: {first_line(error)}; {_WRITE_ONE}"
        ) from error
    if word.isdigit() and len(word) <= _MAX_DIGITS:
        return iteration_folder(root, int(word))
    if not word.isprintable() or Path(word).name != word or len(word) > _MAX_NAME:
        raise CheckpointError(f"{tracker} holds {word!r:.60}, which is no name; {_WRITE_ONE}")
    return root / word
