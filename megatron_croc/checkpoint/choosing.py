"""Choice of the checkpoint to read, verified before anything is loaded from it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_croc.checkpoint.manifest import MANIFEST_FILE, find_damage, read_manifest
from megatron_croc.checkpoint.retention import being_read
from megatron_croc.checkpoint.run_folder import RUN_ID_FILE, own_checkpoints
from megatron_croc.checkpoint.safe_reading import read_index, tensor_files
from megatron_croc.checkpoint.state import LATEST_FILE, latest_checkpoint
from megatron_croc.config.checkpoint import CheckpointConfig
from megatron_croc.errors import CheckpointError
from megatron_croc.log import get_logger, log_on_rank_zero, rank, world_size
from megatron_croc.parallel.rank_zero import on_rank_zero

logger = get_logger(__name__)

WAY_OUT = "--no-verify-checkpoint loads it without the check"


@contextmanager
def open_for_resume(checkpoint: CheckpointConfig) -> Iterator[Path | None]:
    """Open the newest undamaged checkpoint of `load`, the same on every rank; None: there is none.

    Checkpoints of another run are passed over. Other runs cannot remove it inside the block.

    Raises:
        CheckpointError: all are damaged or of another run, or the latest is damaged and
            `strict_resume` is set.
    """
    load = checkpoint.load
    assert load is not None
    folders, passed = on_rank_zero(lambda: own_checkpoints(load))
    if passed and (checkpoint.strict_resume or not folders):
        raise CheckpointError(
            f"{'; '.join(passed)}; no other is taken (remove {Path(load) / RUN_ID_FILE} to go on "
            "with the latest)"
        )
    for folder in folders:
        with being_read(folder):
            damage = agreed_damage(folder) if checkpoint.verify_checkpoint else []
            if not damage:
                if passed:
                    log_on_rank_zero(
                        logger, logging.WARNING, "%s; using %s instead", "; ".join(passed), folder
                    )
                yield folder
                return
        passed.append(_line(folder, damage))
        if checkpoint.strict_resume:
            break
    if not folders:
        yield None
        return
    ways = ["write the name of a good one into " + LATEST_FILE, WAY_OUT]
    if checkpoint.strict_resume and len(folders) > 1:
        ways.insert(0, f"without --strict-resume {folders[1]} is tried")
    raise CheckpointError(f"{'; '.join(passed)}; no other is taken ({', or '.join(ways)})")


@contextmanager
def open_for_start(root: str | Path, *, verify: bool) -> Iterator[Path]:
    """Open the checkpoint that a new run starts from; never an older one instead.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = latest_checkpoint(root)
    if folder is None:
        raise CheckpointError(
            f"--pretrained-checkpoint {root}: no checkpoint there (neither {LATEST_FILE} nor a "
            "train_state.json)"
        )
    with being_read(folder):
        if verify and (damage := agreed_damage(folder)):
            raise CheckpointError(f"{_line(folder, damage)}; {WAY_OUT}")
        yield folder


def agreed_damage(folder: Path) -> list[str]:
    """Check a checkpoint, each rank a share of the files; return the damage that all found."""
    mine = find_damage(folder, share=rank(), shares=world_size()) or unlisted_files(folder)
    everyone: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(everyone, mine)
    return sorted({line for lines in everyone for line in lines})


def unlisted_files(folder: Path) -> list[str]:
    """Name a file of tensors that the index needs and the manifest does not list."""
    try:
        needed = tensor_files(read_index(folder))
        listed = set(read_manifest(folder))
    except CheckpointError:
        return []  # its reader refuses an index that is damaged or runs code
    return [f"{MANIFEST_FILE} does not list {name}" for name in sorted(needed - listed)[:1]]


def _line(folder: Path, damage: list[str]) -> str:
    more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
    return f"{folder} is damaged: {damage[0]}{more}"
