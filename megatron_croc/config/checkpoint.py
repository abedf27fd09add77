"""What is saved, how often, and what a run starts from."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints as Megatron writes them: iter_0000100/ and latest_checkpointed_iteration.txt."""

    save: str | None = None
    """Folder checkpoints are written to; None: none are written."""

    save_interval: int = 1000
    """Optimizer steps between checkpoints; one is always written at the end."""

    load: str | None = None
    """Folder to resume from (weights, optimizer, position in the data); nothing there: start."""

    pretrained_checkpoint: str | None = None
    """Folder to take weights from when nothing is resumed: the stage before, or a whole model in
    Hugging Face's format (a released Croc, ViCToR or LLaVA-1.5, an export of ours)."""
