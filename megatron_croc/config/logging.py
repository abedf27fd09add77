"""What is written down while training."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class LoggingConfig:
    """Console, metrics.jsonl, TensorBoard, Weights & Biases, Prometheus; times and profiles."""

    log_interval: int = 10
    """Optimizer steps between lines."""

    log_dir: str | None = None
    """Folder for metrics.jsonl and TensorBoard events; None: the folder of `save`."""

    tensorboard: bool = True
    """Write TensorBoard events (when the package is there)."""

    wandb_project: str | None = None
    """Weights & Biases project; None: off."""

    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases."""

    prometheus_port: int = 0
    """Rank 0 serves all metrics for Prometheus at this port; 0: off."""

    timing_log_level: int = 1
    """0: no time split; 1: data, vision, matching, forward, backward, waiting, ... as shares of the
    time; 2: also the seconds of megatron's own timers."""

    log_straggler: bool = True
    """Each interval, compare the ranks' times (needs timing_log_level 1): stragglers.jsonl, and a
    warning that names slow ranks and their hosts."""

    straggler_percent: float = 30.0
    """A rank this much slower than the median of its peers is a straggler, percent."""

    profile: bool = False
    """Write a torch.profiler trace of some steps to log_dir."""

    profile_step_start: int = 10
    """First step that is profiled."""

    profile_step_end: int = 12
    """Step before which profiling ends."""

    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that are profiled."""

    record_memory_history: bool = False
    """Write every allocation of device memory in the steps of the profile window, with its stack,
    to log_dir (CUDA)."""
