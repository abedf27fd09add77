"""Settings of saving, resuming and initial weights."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints in Megatron's layout: iter_0000100/ and latest_checkpointed_iteration.txt."""

    save: str | None = None
    """Folder of the run, for checkpoints; a run that finds its own there goes on. None: none."""

    save_interval: int = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""

    async_save: bool = False
    """Copy the state to host memory, and train on while a thread writes it."""

    keep_last: int | None = None
    """Number of newest checkpoints to keep in `save`; None: all."""

    keep_every: int | None = None
    """Also keep checkpoints whose iteration is a multiple of this; None: only the newest."""

    load: str | None = None
    """Folder to resume from (weights, optimizer, position in the data), if `save` holds no
    checkpoints; or a checkpoint in `save`, to go back to it. If empty, start anew."""

    verify_checkpoint: bool = True
    """Compare every file with its digest in the manifest before loading."""

    strict_resume: bool = False
    """Stop if the latest checkpoint is damaged, instead of resuming from an older one."""

    pretrained_checkpoint: str | None = None
    """Initial weights of a run that is not resumed: a checkpoint of the previous stage, or a model
    in Hugging Face's format (a released Croc, ViCToR or LLaVA-1.5, or our export)."""
