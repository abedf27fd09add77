"""Where a run stands: what a checkpoint holds beside weights and optimizer."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_croc.data.order.row_plan import OrderState
from megatron_croc.errors import CheckpointError

STATE_FILE = "train_state.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"


@dataclass(kw_only=True)
class TrainState:
    """Position of a run."""

    iteration: int = 0
    """Optimizer steps done."""

    consumed_samples: int = 0
    """Samples done, over all sources and epochs."""

    stage: str = ""
    """Training stage that wrote the checkpoint."""

    num_skipped: int = 0
    """Steps whose update was left out because loss or gradient could not be right."""

    skipped_in_a_row: int = 0
    """Of those, how many came last, one after the other."""

    recent_losses: list[float] = field(default_factory=list)
    """What a spike is measured against; empty when spikes are not looked for."""

    order: OrderState | None = None
    """Where the run stands in its order of samples; None before its first step."""

    def resume_point(self) -> OrderState | None:
        """Where the order of samples goes on; None at the start of a run.

        Raises:
            CheckpointError: the checkpoint does not say.
        """
        if self.iteration and self.order is None:
            raise CheckpointError(
                f"the checkpoint of iteration {self.iteration} does not say which samples are done "
                f'(no "order" in {STATE_FILE}): start a new run from it with '
                "--pretrained-checkpoint"
            )
        return self.order

    def advance(self, num_samples: int, order: OrderState | None) -> None:
        """Count a step of `num_samples`; `order` says where the next one begins."""
        self.iteration += 1
        self.consumed_samples += num_samples
        self.order = order

    def progress(self) -> dict[str, float]:
        """Counters of the samples done, in all and of each source."""
        counters: dict[str, float] = {"consumed_samples": self.consumed_samples}
        if self.order is not None:
            for name, samples in zip(self.order.sources, self.order.consumed, strict=True):
                counters[f"source_samples/{name}"] = samples
                counters[f"source_epochs/{name}"] = self.order.epochs[name]
        return counters

    def save(self, folder: Path) -> None:
        """Write it beside the weights."""
        (folder / STATE_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "TrainState":
        """Read it back; CheckpointError when it is not there or not readable."""
        path = folder / STATE_FILE
        try:
            tree = json.loads(path.read_text())
            if tree.get("order") is not None:
                tree["order"] = OrderState.from_tree(tree["order"])
            return cls(**tree)
        except (AttributeError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not readable as a training state ({error}); "
                "point --load at a folder that this program wrote"
            ) from error


def iteration_folder(root: Path, iteration: int) -> Path:
    """`iter_0000100` under the checkpoint folder."""
    return root / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration in a folder's name; None when it is no checkpoint's name."""
    digits = folder.name.removeprefix("iter_")
    return int(digits) if folder.name.startswith("iter_") and digits.isdigit() else None


def resume_candidates(root: str | Path) -> list[Path]:
    """Checkpoints a run may resume from, best first: the latest, then older ones.

    A folder that is a checkpoint itself is the only candidate. Without a tracker file (a run that
    was killed while it published its first checkpoint), every checkpoint is one.
    """
    root = Path(root)
    if (root / STATE_FILE).exists():
        return [root]
    there = {n: folder for folder in root.glob("iter_*") if (n := iteration_of(folder)) is not None}
    folders = [there[n] for n in sorted(there, reverse=True)]
    if (latest := _tracked(root)) is None:
        return folders
    last = iteration_of(latest)
    return [latest, *(f for f in folders if last is None or iteration_of(f) < last)]  # type: ignore[operator]


def latest_checkpoint(root: str | Path) -> Path | None:
    """The checkpoint that `root` names: itself, or the latest in it; None when there is none.

    Raises:
        CheckpointError: the tracker file names a checkpoint that is not there.
    """
    root = Path(root)
    if (root / STATE_FILE).exists():
        return root
    folder = _tracked(root)
    if folder is not None and not (folder / STATE_FILE).exists():
        raise CheckpointError(
            f"{root / LATEST_FILE} names {folder.name}, which is not a complete checkpoint; "
            f"write the name of one that is into {LATEST_FILE}"
        )
    return folder


def _tracked(root: Path) -> Path | None:
    tracker = root / LATEST_FILE
    if not tracker.exists():
        return None
    word = tracker.read_text().strip()
    return root / word if not word.isdigit() else iteration_folder(root, int(word))
