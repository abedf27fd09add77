"""Weights & Biases: one W&B run per folder, also over stops and resumes."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically
from megatron_croc.config.logging import LoggingConfig
from megatron_croc.errors import first_line
from megatron_croc.log import get_logger

logger = get_logger(__name__)

RUN_ID_FILE = "wandb_run_id.txt"
"""File beside metrics.jsonl with the id of the W&B run; a resumed run continues it. W&B ignores
steps that it has already, so steps repeated after a resume appear once."""


def open_wandb(
    config: LoggingConfig, settings: Mapping[str, Any], folder: Path | None
) -> Any | None:
    """Open a `wandb.Run` if `wandb_project` is set.

    Args:
        config: project and name.
        settings: all settings of the run, which are sent to W&B.
        folder: folder of metrics.jsonl; None: every start is a new W&B run.

    Returns:
        the W&B run; None without a project, or after a warning when W&B cannot be used.
    """
    if config.wandb_project is None:
        return None
    try:
        from wandb import Error, init  # type: ignore[import-not-found]
    except ImportError:
        _warn(config.wandb_project, "wandb is not installed: pip install -e '.[wandb]'")
        return None
    try:
        return init(
            project=config.wandb_project,
            name=config.wandb_exp_name,
            config=dict(settings),
            dir=folder,
            id=None if folder is None else _run_id(folder),
            resume=None if folder is None else "allow",
        )
    except (Error, OSError) as error:
        _warn(config.wandb_project, f"{first_line(error)}; WANDB_MODE=offline needs no network")
        return None


def _run_id(folder: Path) -> str:
    file = folder / RUN_ID_FILE
    if not file.exists() or not file.read_bytes().strip():
        write_atomically(file, (uuid.uuid4().hex[:8] + "\n").encode())
    return file.read_text(encoding="ascii", errors="replace").strip()


def _warn(project: str, reason: str) -> None:
    logger.warning(f"wandb_project={project}: {reason}; metrics go to metrics.jsonl")
