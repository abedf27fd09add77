"""TensorBoard's events of a run, written as long as the disk takes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_croc.best_effort import BestEffort
from megatron_croc.log import get_logger

logger = get_logger(__name__)


class TensorBoard:
    """Writer of scalars; after a failure, the next ones go to a new file of events."""

    def __init__(self, folder: Path) -> None:
        """Take the folder of the run; events go to `tensorboard/` in it."""
        self._folder = folder / "tensorboard"
        self._effort = BestEffort("TensorBoard", errors=(Exception,))
        self._writer: Any | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("TensorBoard is not installed; metrics go to metrics.jsonl only")
            self._open = None
        else:
            self._open = SummaryWriter
            with self._effort:
                self._writer = SummaryWriter(log_dir=str(self._folder))

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Write the scalars of one step."""
        if self._open is None:
            return
        with self._effort:
            writer, self._writer = self._writer, None
            writer = writer or self._open(log_dir=str(self._folder))
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
            self._writer = writer

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            with self._effort:
                self._writer.close()
