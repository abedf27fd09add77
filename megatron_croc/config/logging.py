"""What is written down while training."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class LoggingConfig:
    """Console, metrics.jsonl, TensorBoard, Weights & Biases."""

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
