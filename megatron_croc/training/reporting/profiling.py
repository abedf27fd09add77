"""A window of steps under torch.profiler, and a record of the device memory over the same steps.

<log_dir>/profile/rank_00000_steps_10_11.json.gz      chrome://tracing, ui.perfetto.dev
<log_dir>/profile/rank_00000_memory.pickle            pytorch.org/memory_viz (CUDA)
"""

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_croc.best_effort import BestEffort
from megatron_croc.config.logging import LoggingConfig
from megatron_croc.log import get_logger, rank
from megatron_croc.parallel.device import (
    has_cuda,
    record_memory_history,
    synchronize,
    write_memory_history,
)

logger = get_logger(__name__)


class ProfileWindow:
    """Profiler of the steps from profile_step_start up to, but not including, profile_step_end."""

    def __init__(self, config: LoggingConfig, folder: Path | None, iteration: int) -> None:
        """Prepare, and start at once if the window begins with the next step.

        Args:
            config: steps, ranks and kinds of record.
            folder: folder of the run; files go to `profile/` in it. None: nothing is recorded.
            iteration: steps done so far.
        """
        self._first, self._end = config.profile_step_start, config.profile_step_end
        self._profiles, self._records = config.profile, config.record_memory_history
        self._profiler: profile | None = None
        self._is_open = self._has_memory = False
        self._effort = BestEffort("the profile", errors=(OSError, RuntimeError))
        chosen = folder is not None and rank() in config.profile_ranks
        self._folder = folder / "profile" if folder is not None and chosen else None
        if (self._profiles or self._records) and iteration >= self._first:
            logger.warning(
                f"profile_step_start={self._first}: the run is at step {iteration} already, "
                "nothing is profiled"
            )
        self.after_step(iteration)

    def after_step(self, iteration: int) -> None:
        """Start before the first step of the window, and stop after its last.

        Args:
            iteration: steps done so far.
        """
        if self._folder is None or not (self._profiles or self._records):
            return
        if iteration == self._first - 1:
            self._begin()
        elif iteration == self._end - 1:
            self.close(last=iteration)

    def close(self, last: int | None = None) -> None:
        """Stop recording and write the files. Outside the window it does nothing.

        Args:
            last: last step recorded; None: the run ends inside the window.
        """
        if not self._is_open:
            return
        self._is_open = False
        with self._effort:
            self._write(last)

    def _write(self, last: int | None) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"rank_{rank():05d}"
        if self._profiler is not None:
            synchronize()
            self._profiler.stop()
            steps = f"steps_{self._first}_{'end' if last is None else last}"
            path = self._folder / f"{stem}_{steps}.json.gz"
            self._profiler.export_chrome_trace(str(path))
            self._profiler = None
            logger.info(f"profile: {path}")
        if self._has_memory:
            path = self._folder / f"{stem}_memory.pickle"
            write_memory_history(path)
            logger.info(f"memory history: {path}")

    def _begin(self) -> None:
        self._is_open = True
        if self._profiles:
            activities = [ProfilerActivity.CPU]
            if has_cuda():
                activities.append(ProfilerActivity.CUDA)
            synchronize()
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
        if self._records:
            self._has_memory = record_memory_history()
            if not self._has_memory:
                logger.warning(
                    "record_memory_history: only a CUDA device keeps one; nothing is recorded"
                )
