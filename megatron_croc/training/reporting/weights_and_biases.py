"""The run in Weights & Biases: one, however often training was stopped and went on."""

import uuid
from pathlib import Path
from typing import Any

from megatron_croc.config.base import to_tree
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import first_line
from megatron_croc.log import get_logger

logger = get_logger(__name__)

RUN_ID_FILE = "wandb_run_id.txt"
"""Beside metrics.jsonl; whoever goes on in that folder goes on with that run. Steps that are done
again after a resume are left out by W&B, which has them."""


def open_wandb(run: RunConfig, folder: Path | None) -> Any | None:
    """The `wandb.Run` that `wandb_project` asks for; a log line and None where it cannot be had.

    Args:
        run: the run; all of its settings are sent.
        folder: of metrics.jsonl; None: every start is a run of its own.
    """
    log = run.logging
    if log.wandb_project is None:
        return None
    try:
        from wandb import Error, init  # type: ignore[import-not-found]
    except ImportError:
        _warn(log.wandb_project, "wandb is not installed: pip install -e '.[wandb]'")
        return None
    try:
        return init(
            project=log.wandb_project,
            name=log.wandb_exp_name,
            config=to_tree(run),
            dir=folder,
            id=None if folder is None else _run_id(folder),
            resume=None if folder is None else "allow",
        )
    except Error as error:
        _warn(log.wandb_project, f"{first_line(error)}; WANDB_MODE=offline needs no network")
        return None


def _run_id(folder: Path) -> str:
    file = folder / RUN_ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _warn(project: str, reason: str) -> None:
    logger.warning(f"wandb_project={project}: {reason}; metrics go to metrics.jsonl")
