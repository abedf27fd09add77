"""Where a run stands: what a checkpoint holds beside weights and optimizer."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_croc.errors import CheckpointError

STATE_FILE = "train_state.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"


@dataclass(kw_only=True)
class TrainState:
    """Position of a run. The data order is a pure function of it and the seed."""

    iteration: int = 0
    """Optimizer steps done."""

    consumed_samples: int = 0
    """Samples done, over all epochs; the next one is the next in order."""

    stage: str = ""
    """Training stage that wrote the checkpoint."""

    def save(self, folder: Path) -> None:
        """Write it beside the weights."""
        (folder / STATE_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "TrainState":
        """Read it back; CheckpointError when it is not there or not readable."""
        path = folder / STATE_FILE
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not readable as a training state ({error}); "
                "point --load at a folder that this program wrote"
            ) from error


def iteration_folder(root: Path, iteration: int) -> Path:
    """`iter_0000100` under the checkpoint folder."""
    return root / f"iter_{iteration:07d}"


def latest_checkpoint(root: str | Path) -> Path | None:
    """The checkpoint that `root` names: itself, or the latest in it; None when there is none.

    Raises:
        CheckpointError: the tracker file names a checkpoint that is not there.
    """
    root = Path(root)
    if (root / STATE_FILE).exists():
        return root
    tracker = root / LATEST_FILE
    if not tracker.exists():
        return None
    word = tracker.read_text().strip()
    folder = root / word if not word.isdigit() else iteration_folder(root, int(word))
    if not (folder / STATE_FILE).exists():
        raise CheckpointError(
            f"{tracker} names {folder.name}, which is not a complete checkpoint; "
            f"write the name of one that is into {tracker.name}"
        )
    return folder
