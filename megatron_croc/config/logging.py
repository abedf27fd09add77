"""Settings of logs, metrics and profiles."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class LoggingConfig:
    """Console, metrics.jsonl, TensorBoard, Weights & Biases, Prometheus, times and profiles."""

    log_interval: int = 10
    """Optimizer steps between lines of metrics."""

    log_wide: bool = False
    """Put most metrics into the line on the console, not the few that fit a terminal."""

    log_dir: str | None = None
    """Folder for metrics.jsonl and TensorBoard events; None: the folder `save`."""

    tensorboard: bool = True
    """Write TensorBoard events, if the package is installed."""

    wandb_project: str | None = None
    """Weights & Biases project; None: off."""

    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases."""

    prometheus_port: int = 0
    """Port at which rank 0 serves all metrics for Prometheus; 0: off."""

    timing_log_level: int = 1
    """0: no time split. 1: shares of the time spent on data, vision, matching, forward, backward,
    waiting, ... 2: also the seconds of megatron's timers."""

    log_straggler: bool = True
    """Compare the ranks' times in each interval (needs timing_log_level 1): stragglers.jsonl, and a
    warning that names slow ranks and their hosts."""

    straggler_percent: float = 30.0
    """Delay over the median of its peers that makes a rank a straggler, percent."""

    profile: bool = False
    """Write a torch.profiler trace of some steps to log_dir."""

    profile_step_start: int = 10
    """First step to profile."""

    profile_step_end: int = 12
    """Step after the last one to profile."""

    profile_ranks: tuple[int, ...] = (0,)
    """Ranks to profile."""

    record_memory_history: bool = False
    """Write all allocations of device memory in the profiled steps, with stacks, to log_dir
    (CUDA only)."""
