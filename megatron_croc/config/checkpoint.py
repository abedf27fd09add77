"""What is saved, how often, and what a run starts from."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints as Megatron writes them: iter_0000100/ and latest_checkpointed_iteration.txt."""

    save: str | None = None
    """Folder checkpoints are written to; None: none are written."""

    save_interval: int = 1000
    """Optimizer steps between checkpoints; one is always written at the end."""

    async_save: bool = False
    """Copy the state to host memory and go on training while a thread writes it."""

    keep_last: int | None = None
    """Checkpoints of this run's folder to keep, the newest first; None: all."""

    keep_every: int | None = None
    """Also keep those whose iteration is a multiple of this; None: only the newest."""

    load: str | None = None
    """Folder to resume from (weights, optimizer, position in the data); nothing there: start."""

    verify_checkpoint: bool = True
    """Compare every file with the digests written beside it before anything is loaded."""

    strict_resume: bool = False
    """Stop when the latest checkpoint is damaged, instead of taking the one before it."""

    pretrained_checkpoint: str | None = None
    """Folder to take weights from when nothing is resumed: the stage before, or a whole model in
    Hugging Face's format (a released Croc, ViCToR or LLaVA-1.5, an export of ours)."""
