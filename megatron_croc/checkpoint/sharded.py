"""Content of a checkpoint, resuming from one, and loading weights of another training stage.

All of it works at any layout.

<save>/iter_0000100/      weights and optimizer (torch_dist), train_state.json, run.yaml,
                          manifest.json (written last: digests of all other files)
<save>/latest_checkpointed_iteration.txt      written last, atomically
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointError
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_croc.checkpoint.choosing import open_for_resume, open_for_start
from megatron_croc.checkpoint.safe_reading import load_state, read_index
from megatron_croc.checkpoint.shares import deal_out, state_to_load, state_to_save
from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.checkpoint import CheckpointConfig
from megatron_croc.errors import CheckpointError, first_line
from megatron_croc.log import get_logger, log_on_rank_zero

logger = get_logger(__name__)

FRESH_PARTS = ("prompt_pool.", "reconstruction_head.")
"""Parts of stage pretrain_croc only; they keep their initial weights if a checkpoint lacks them."""


def _metadata(pg_collection: ProcessGroupCollection) -> dict[str, Any]:
    return {
        "singleton_local_shards": False,
        "dp_cp_group": pg_collection.dp_cp,
    }


def _model_state(chunks: Sequence[nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    """Sharded state of all chunks. Keys do not name the chunk, so a checkpoint fits any layout."""
    models: list[Any] = unwrap_model(list(chunks), DistributedDataParallel)
    return {
        f"model{number}": model.sharded_state_dict(metadata=metadata)
        for number, model in enumerate(models)
    }


def checkpoint_content(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, pg_collection: ProcessGroupCollection
) -> dict[str, Any]:
    """megatron's sharded state of weights and optimizer. Every rank must call it."""
    model_state = _model_state(chunks, _metadata(pg_collection))
    mine = deal_out(model_state, pg_collection.dp_cp)
    return {**model_state, "optimizer": state_to_save(optimizer, model_state, mine)}


def load_checkpoint(
    config: CheckpointConfig,
    stage: str,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
) -> TrainState | None:
    """Load weights, optimizer and state from the folder `config.load`.

    Args:
        config: folder and checks.
        stage: training stage of this run.
        chunks: this rank's model chunks.
        optimizer: distributed optimizer.
        pg_collection: process groups.

    Returns:
        the state of the run; None when there is no checkpoint to resume from.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another stage or model.
    """
    if config.load is None:
        return None
    with open_for_resume(config) as folder:
        return None if folder is None else _resume(folder, stage, chunks, optimizer, pg_collection)


def _resume(
    folder: Path,
    stage: str,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
) -> TrainState:
    state = TrainState.load(folder)
    if state.stage != stage:
        raise CheckpointError(
            f"{folder} was written by stage {state.stage}, this run is {stage}; to start "
            f"this stage from its weights use --pretrained-checkpoint {folder.parent}"
        )
    model_state = _model_state(chunks, _metadata(pg_collection))
    _check_fit(folder, model_state, fresh=())
    content = {**model_state, "optimizer": state_to_load(optimizer, model_state)}
    loaded = _load(content, folder)
    _load_chunks(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    log_on_rank_zero(logger, 20, "resumed from %s", folder)
    return state


def load_weights(
    root: str | Path,
    chunks: Sequence[nn.Module],
    pg_collection: ProcessGroupCollection,
    *,
    verify: bool = True,
) -> Path:
    """Load weights only, from the previous training stage; pool and head may be missing there.

    Args:
        root: a checkpoint, or a folder of checkpoints (the latest is taken).
        chunks: this rank's model chunks.
        pg_collection: process groups.
        verify: compare every file with its digest first.

    Returns:
        the folder of the checkpoint.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or one of another architecture (the
            message names the parameter).
    """
    with open_for_start(root, verify=verify) as folder:
        _take_weights(folder, chunks, pg_collection)
    return folder


def _take_weights(
    folder: Path, chunks: Sequence[nn.Module], pg_collection: ProcessGroupCollection
) -> None:
    model_state = _model_state(chunks, _metadata(pg_collection))
    missing = _check_fit(folder, model_state, fresh=FRESH_PARTS)
    for entries in model_state.values():
        for name in [n for n, entry in entries.items() if getattr(entry, "key", n) in missing]:
            del entries[name]
    loaded = _load(model_state, folder)
    _load_chunks(chunks, loaded, strict=False)
    fresh = sorted({key.split(".")[0] for key in missing})
    log_on_rank_zero(
        logger,
        20,
        "loaded weights from %s%s",
        folder,
        f"; fresh: {', '.join(fresh)}" if fresh else "",
    )


def _load(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    _forget_objects(content)
    try:
        return load_state(content, folder)
    except CheckpointError:
        raise
    except (CheckpointingException, KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {first_line(error)}") from error
    except TorchCheckpointError as error:  # a BaseException, equal on every rank
        causes = {f"{type(e).__name__}: {first_line(e)}" for e, _ in error.failures.values()}
        raise CheckpointError(f"{folder} cannot be read: {'; '.join(sorted(causes))}") from error


def _forget_objects(content: dict[str, Any]) -> None:
    """Skip stored objects: they are pickles, and megatron's extra states are all None."""
    for entries in content.values():
        for name in [n for n, entry in entries.items() if isinstance(entry, ShardedObject)]:
            entries[name] = LocalNonpersistentObject(None)


def _load_chunks(
    chunks: Sequence[nn.Module], loaded: dict[str, Any], *, strict: bool = True
) -> None:
    models: list[Any] = unwrap_model(list(chunks), DistributedDataParallel)
    for number, model in enumerate(models):
        model.load_state_dict(loaded[f"model{number}"], strict=strict)


def _check_fit(folder: Path, model_state: dict[str, Any], fresh: tuple[str, ...]) -> set[str]:
    """Compare names and shapes of the checkpoint with the model, before any tensor is read.

    Returns:
        keys of this model that the checkpoint lacks; all are in the parts named by `fresh`.

    Raises:
        CheckpointError: other keys are missing, or shapes differ.
    """
    stored = read_index(folder).state_dict_metadata
    shapes = {k: tuple(t.size) for k, t in stored.items() if isinstance(t, TensorStorageMetadata)}
    wanted: dict[str, tuple[int, ...]] = {}
    padded: set[str] = set()
    for entry in nested_values(model_state):
        pieces = {"piece": entry}
        if isinstance(entry, ShardedTensorFactory):
            apply_factories(pieces)
        for piece in nested_values(pieces):
            if isinstance(piece, ShardedTensor):
                wanted[piece.key] = tuple(piece.global_shape)
                if piece.allow_shape_mismatch:  # a vocabulary, padded to a multiple of TP
                    padded.add(piece.key)
    missing = {key for key in wanted if key not in shapes}
    faults = [
        f"  {key}: missing, {wanted[key]} needed"
        for key in sorted(missing)
        if not key.startswith(fresh)
    ] + [
        f"  {key}: {shapes[key]} there, {wanted[key]} needed"
        for key in sorted(wanted)
        if key in shapes
        and shapes[key] != wanted[key]
        and not (key in padded and _differ_by_padding(shapes[key], wanted[key]))
    ]
    if faults:
        more = f"\n  ... and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{folder} holds another architecture than this run's model:\n"
            + "\n".join(faults[:5])
            + more
            + f"\nits own settings are in {folder / 'run.yaml'}"
        )
    return missing


MAX_PADDING = 128
"""Largest difference in rows between two paddings of one vocabulary (TP sizes are far smaller)."""


def _differ_by_padding(there: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Return True if two vocabulary tables differ only in their number of padding rows."""
    return there[1:] == needed[1:] and abs(there[0] - needed[0]) < MAX_PADDING
