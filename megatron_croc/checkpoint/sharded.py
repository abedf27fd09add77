"""What a checkpoint holds; resume from one, or take weights from another stage's, at any layout.

<save>/iter_0000100/      weights and optimizer (torch_dist), train_state.json, run.yaml,
                          manifest.json (written last: digests of all the others)
<save>/latest_checkpointed_iteration.txt      moved into place last, atomically
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
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointError
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_croc.checkpoint.choosing import open_for_resume, open_for_start
from megatron_croc.checkpoint.safe_reading import load_state, read_index
from megatron_croc.checkpoint.shares import deal_out, state_to_load, state_to_save
from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import CheckpointError, first_line
from megatron_croc.log import get_logger, log_on_rank_zero

logger = get_logger(__name__)

FRESH_PARTS = ("prompt_pool.", "reconstruction_head.")
"""Parts that only stage pretrain_croc has: drawn fresh when a checkpoint lacks them."""


def _metadata(pg_collection: ProcessGroupCollection) -> dict[str, Any]:
    return {
        "singleton_local_shards": False,
        "dp_cp_group": pg_collection.dp_cp,
    }


def _model_state(chunks: Sequence[nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    """Sharded state of every chunk; names carry no chunk, so layouts can be changed."""
    return {
        f"model{number}": _unwrap(chunk).sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for number, chunk in enumerate(chunks)
    }


def _unwrap(chunk: nn.Module) -> nn.Module:
    return chunk.module if hasattr(chunk, "ddp_config") else chunk  # type: ignore[return-value]


def checkpoint_content(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, pg_collection: ProcessGroupCollection
) -> dict[str, Any]:
    """megatron's sharded state of weights and optimizer; every rank must ask for it."""
    model_state = _model_state(chunks, _metadata(pg_collection))
    mine = deal_out(model_state, pg_collection.dp_cp)
    return {**model_state, "optimizer": state_to_save(optimizer, model_state, mine)}


def load_checkpoint(
    run: RunConfig,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
) -> TrainState | None:
    """Resume from `run.checkpoint.load`; None when there is nothing to resume from.

    Raises:
        CheckpointError: a checkpoint of another stage or model, or a damaged one.
    """
    if run.checkpoint.load is None:
        return None
    with open_for_resume(run.checkpoint) as folder:
        return None if folder is None else _resume(folder, run, chunks, optimizer, pg_collection)


def _resume(
    folder: Path,
    run: RunConfig,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
) -> TrainState:
    state = TrainState.load(folder)
    if state.stage != run.stage:
        raise CheckpointError(
            f"{folder} was written by stage {state.stage}, this run is {run.stage}; to start "
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
    """Take weights only, from the stage before; the pool and head may be missing there.

    Args:
        root: a checkpoint, or a folder whose latest is meant.
        chunks: this rank's model.
        pg_collection: process groups.
        verify: compare every file with its digest first.

    Raises:
        CheckpointError: nothing there, damaged, or a checkpoint of another architecture (names
            the key).
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
        "took weights from %s%s",
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
    except TorchCheckpointError as error:  # a BaseException; the same one on every rank
        causes = {f"{type(e).__name__}: {first_line(e)}" for e, _ in error.failures.values()}
        raise CheckpointError(f"{folder} cannot be read: {'; '.join(sorted(causes))}") from error


def _forget_objects(content: dict[str, Any]) -> None:
    """Take no stored object: megatron's extra states are all None, and objects are pickles."""
    for entries in content.values():
        for name in [n for n, entry in entries.items() if isinstance(entry, ShardedObject)]:
            entries[name] = LocalNonpersistentObject(None)


def _load_chunks(
    chunks: Sequence[nn.Module], loaded: dict[str, Any], *, strict: bool = True
) -> None:
    for number, chunk in enumerate(chunks):
        _unwrap(chunk).load_state_dict(loaded[f"model{number}"], strict=strict)


def _check_fit(folder: Path, model_state: dict[str, Any], fresh: tuple[str, ...]) -> set[str]:
    """Compare names and shapes before anything is read.

    Returns:
        keys of this model that the checkpoint lacks; all of them in the parts named by `fresh`.
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
"""Rows by which two paddings of one vocabulary may differ (TP sizes are far smaller)."""


def _differ_by_padding(there: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Whether two vocabulary tables are the same but for the padding of their rows."""
    return there[1:] == needed[1:] and abs(there[0] - needed[0]) < MAX_PADDING
