"""Folder of a run: which run it belongs to, and where a run with `save` resumes from.

    <save>/run_id.txt         id of the run, made once; also in train_state.json of its checkpoints
    <save>/run.yaml           all settings, written before the first step
    <save>/run_0000400.yaml   settings up to step 400, where the run was resumed with others

A checkpoint of another run is never resumed from and never removed. Checkpoints without an id (made
before there were ids) belong to the run of their folder.
"""

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import make_directory, write_atomically
from megatron_croc.checkpoint.state import (
    STATE_FILE,
    TrainState,
    resume_candidates,
)
from megatron_croc.config.base import changes_from_tree, read_yaml, shown, to_tree
from megatron_croc.config.checkpoint import CheckpointConfig
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import CheckpointError, ConfigError
from megatron_croc.file_reading import UnreadableError, read_json
from megatron_croc.log import get_logger

logger = get_logger(__name__)

RUN_ID_FILE = "run_id.txt"
SETTINGS_FILE = "run.yaml"

HOW_COMPUTED = frozenset({"attention_backend", "assign_backend", "overlap_assignment"})
"""Settings of the model that do not change its results: a run may be resumed with others."""

NUM_NAMED = 3
"""Number of differences that a message names."""


def resume_root(config: CheckpointConfig) -> str | None:
    """Return the folder to resume from: `save` if it holds checkpoints, else `load`.

    A `load` inside `save` (to go back to an older checkpoint) is taken as it is.
    """
    if config.save is None or resumes_in_place(config):
        return config.load
    return config.save if resume_candidates(config.save) else config.load


def resumes_in_place(config: CheckpointConfig) -> bool:
    """Return True if `load` is the folder of `save`, or a checkpoint in it."""
    if config.save is None or config.load is None:
        return False
    save, load = Path(config.save).resolve(), Path(config.load).resolve()
    return save in (load, load.parent)


def refuse_other_run(run: RunConfig) -> None:
    """Refuse to go on in the folder of another run: another stage, model or seed.

    With `--load` of the folder itself, its checkpoints are taken as they are.

    Args:
        run: stage, model, seed and folders are read.

    Raises:
        CheckpointError: `save` holds the checkpoints of another run; names what differs.
    """
    save = run.checkpoint.save
    if save is None or resumes_in_place(run.checkpoint):
        return
    candidates = resume_candidates(save)
    for folder in candidates:
        stage = read_state(folder).get("stage", run.stage)
        if stage != run.stage:
            raise CheckpointError(
                f"--save {save} holds a checkpoint of stage {stage}, this run is {run.stage}: save "
                f"to another folder; --pretrained-checkpoint {save} starts from its weights"
            )
        if (stored := _stored_settings(folder)) is None:
            continue
        if differences := list(_differences(stored, to_tree(run))):
            more = len(differences) - NUM_NAMED
            raise CheckpointError(
                f"--save {save} holds another run: {', '.join(differences[:NUM_NAMED])}"
                f"{f' and {more} more' if more > 0 else ''}: save to another folder, or add --load "
                f"{save} to go on with its checkpoints all the same"
            )
        return


def _stored_settings(checkpoint: Path) -> dict[str, Any] | None:
    """Read the settings in a checkpoint; None if they cannot be read (damage is found later)."""
    path = checkpoint / SETTINGS_FILE
    faults: list[str] = []
    try:
        changes = changes_from_tree(RunConfig, read_yaml(path), faults, source=str(path))
    except (ConfigError, ValueError):
        return None
    return None if faults else dict(changes)


def _differences(stored: dict[str, Any], tree: dict[str, Any]) -> Iterator[str]:
    """Yield "NAME A there, B here" for settings of the model and the seed."""
    for path, there in stored.items():
        section, _, name = path.rpartition(".")
        if name in HOW_COMPUTED or (section.split(".")[0] != "model" and path != "training.seed"):
            continue
        here: Any = tree
        for key in path.split("."):
            here = here[key]
        if shown(there) != shown(here):
            yield f"{name} {shown(there)} there, {shown(here)} here"


def own_checkpoints(root: str | Path) -> tuple[list[Path], list[str]]:
    """List the checkpoints to resume from, and a line for each one of another run.

    The run of the folder is that of run_id.txt; without it, that of the latest checkpoint.
    """
    folders = resume_candidates(root)
    if folders == [Path(root)]:
        return folders, []
    run_id = read_run_id(Path(root)) or next(map(checkpoint_run_id, folders), "")
    own = [folder for folder in folders if not is_foreign(folder, run_id)]
    lines = [
        f"{folder} is of another run ({checkpoint_run_id(folder)}, not {run_id})"
        for folder in folders
        if folder not in own
    ]
    return own, lines


def is_foreign(checkpoint: Path, run_id: str) -> bool:
    """Return True if a checkpoint has the id of another run than `run_id` ("": any run)."""
    return bool(run_id) and checkpoint_run_id(checkpoint) not in ("", run_id)


def read_run_id(root: Path) -> str:
    """Id of the run that a folder belongs to; "" if it has none."""
    try:
        return (root / RUN_ID_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def checkpoint_run_id(checkpoint: Path) -> str:
    """Id of the run that wrote a checkpoint; "" if it has none, or cannot be read."""
    return str(read_state(checkpoint).get("run_id", ""))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read train_state.json as it is; empty if it cannot be read."""
    try:
        return read_json(checkpoint / STATE_FILE)
    except (OSError, UnreadableError):
        return {}


def begin_run(
    config: CheckpointConfig, folders: list[Path], state: TrainState, settings: str
) -> list[Path]:
    """Write id and settings to the folders of a run, before its first step. Rank 0 calls it.

    A run that does not resume in its own folder gets a new id, also if it starts from a state of
    another one (a branch).

    Args:
        config: folders of this run; `load` is the folder it was resumed from.
        folders: `save` and the folder of logs, as far as there are any.
        state: the state to begin with; gets the id.
        settings: all settings as YAML.

    Returns:
        the folders that were another run's until now.

    Raises:
        CheckpointError: a file cannot be written.
    """
    is_new = not (state.iteration and resumes_in_place(config))
    if is_new or not state.run_id:
        known = "" if is_new or config.save is None else read_run_id(Path(config.save))
        state.run_id = known or uuid.uuid4().hex[:12]
    others = []
    for folder in dict.fromkeys(folders):
        before = read_run_id(folder)
        if is_new or before not in ("", state.run_id):
            others.append(folder)  # "": made before there were ids
        try:
            make_directory(folder)
            _write_settings(folder, settings, state.iteration)
            if before != state.run_id:
                write_atomically(folder / RUN_ID_FILE, f"{state.run_id}\n".encode())
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be written ({error.strerror}); choose another folder"
            ) from error
    return others


def _write_settings(folder: Path, settings: str, iteration: int) -> None:
    """Write run.yaml; keep one with other settings as run_0000400.yaml."""
    path, kept = folder / SETTINGS_FILE, folder / f"run_{iteration:07d}.yaml"
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if before == settings:
        return
    if before is not None and iteration and not kept.exists():
        os.replace(path, kept)
        logger.log(logging.INFO, "the settings have changed; the old ones are in %s", kept)
    write_atomically(path, settings.encode())
