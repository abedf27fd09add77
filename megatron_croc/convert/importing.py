"""Import Hugging Face weights as a megatron-core checkpoint, in one process, without a GPU.

    <save>/release/        weights (torch_dist), run.yaml, train_state.json
    <save>/latest_checkpointed_iteration.txt      contains "release"

The model is built on torch's meta device, without memory, to list its tensors. All names and shapes
are compared before any data is read. Then each tensor is read, packed and written, one at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from tqdm import tqdm

from megatron_croc.atomic_files import write_atomically
from megatron_croc.checkpoint.manifest import write_manifest
from megatron_croc.checkpoint.state import LATEST_FILE, TrainState
from megatron_croc.config.base import to_yaml
from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.config.run import RunConfig
from megatron_croc.convert.checkpoint_writer import Piece, write_checkpoint
from megatron_croc.convert.names import build_rules, is_ignored
from megatron_croc.convert.source import Source, check_vocabulary, open_source
from megatron_croc.convert.staging import staged_directory
from megatron_croc.convert.state import weight_source
from megatron_croc.errors import CheckpointError
from megatron_croc.log import world_size
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.model.initialization import fresh_weight
from megatron_croc.model.sharded_weights import Shard, iter_shards
from megatron_croc.model.transformer_configs import language_model_config
from megatron_croc.parallel.device import has_cuda
from megatron_croc.parallel.groups import start_distributed, stop_distributed

RELEASE = "release"
"""Name of an imported checkpoint's folder, as in megatron."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Summary of an import."""

    folder: Path
    num_tensors: int
    """Number of written tensors, each layer counted separately."""

    num_bytes: int
    fresh: tuple[str, ...]
    """Parts that were initialised here or, for a whole model, are left to the trainer."""

    ignored: tuple[str, ...]
    """Hugging Face tensors that this model does not use."""


def import_huggingface(
    folder: Path, save: Path, *, vision_folder: Path | None = None, seed: int = 1234
) -> ImportReport:
    """Write a checkpoint for --pretrained-checkpoint of the trainer.

    Args:
        folder: Hugging Face directory, see `open_source`.
        save: folder for `release/`; must not hold a checkpoint.
        vision_folder: the vision tower's directory.
        seed: of projector, pool and head, for a separate language model and tower.

    Raises:
        CheckpointError: a tensor is missing, extra, damaged or of another shape, or `save` is not
            free. Then `release/` is not created.
    """
    tracker = save / LATEST_FILE
    if tracker.exists():
        raise CheckpointError(f"{save}: has a checkpoint already ({tracker.name}); name another")
    source = open_source(folder, vision_folder)
    run = _run_of(source, seed)
    shards, objects = _whole_model(run)
    wanted = [s for s in shards if not (source.is_whole and s.key.startswith(source.fresh))]
    ignored = _check(source, wanted)
    pieces = _pieces(source, run, wanted)
    kept = {key: [None] for key in objects if not key.startswith(_left_out(source))}
    total = sum(piece.num_bytes for piece in pieces)
    final = save / RELEASE
    with (
        staged_directory(final) as staged,
        tqdm(total=total, unit="B", unit_scale=True, desc="import", disable=None) as progress,
    ):
        write_checkpoint(staged, pieces, kept, on_piece=progress.update)
        run.stage = "finetune" if source.is_whole else "pretrain_mlp"
        (staged / "run.yaml").write_text(to_yaml(run))
        TrainState(stage=RELEASE).save(staged)
        write_manifest(staged)
    write_atomically(tracker, f"{RELEASE}\n".encode())
    return ImportReport(
        folder=final,
        num_tensors=len(pieces),
        num_bytes=total,
        fresh=source.fresh,
        ignored=ignored,
    )


def _left_out(source: Source) -> tuple[str, ...]:
    """Return the parts that are not written; the trainer initialises them if it needs them."""
    return source.fresh if source.is_whole else ()


def _run_of(source: Source, seed: int) -> RunConfig:
    run = RunConfig(stage="pretrain_croc", model=source.model)  # the stage with all parts
    run.training.bf16 = source.dtype in (torch.bfloat16, torch.float16)
    run.training.seed = seed
    if source.model.language_model.add_qkv_bias:
        run.data.tokenizer_type = "HuggingFaceTokenizer"
        run.data.conversation_template = "qwen_1_5"
    return run


@contextmanager
def one_process(*, seed: int) -> Iterator[object]:
    """Start process groups for one process on the CPU; stop them at the end.

    Raises:
        CheckpointError: there are several processes, or the process uses a GPU.
    """
    if world_size() != 1:
        raise CheckpointError("conversion runs in one process; start it without torchrun")
    if has_cuda():
        raise CheckpointError(
            "conversion computes on the CPU, and this process on a GPU; start it as "
            "croc convert, or call "
            "megatron_croc.parallel.device.compute_on_cpu() before importing anything else of it"
        )
    try:
        yield start_distributed(ParallelConfig(), seed=seed)
    finally:
        stop_distributed()


def _whole_model(run: RunConfig) -> tuple[list[Shard], list[str]]:
    """List all tensors of the model (one meta-device shard each) and megatron's extra states."""
    with one_process(seed=run.training.seed) as pg, torch.device("meta"):
        model = CrocModel(
            run,
            language_model_config(
                run.model.language_model, parallel=run.parallel, training=run.training
            ),
            pg,  # type: ignore[arg-type]
            pre_process=True,
            post_process=True,
        )
        unique = {shard.name: shard for shard in iter_shards(model)}
        objects = [
            entry.unique_key
            for entry in nested_values(model.sharded_state_dict())
            if isinstance(entry, ShardedObject)
        ]
    return list(unique.values()), objects


def _check(source: Source, shards: list[Shard]) -> tuple[str, ...]:
    """Compare all names and shapes; return the names of unused tensors.

    Raises:
        CheckpointError: lists the faults, one per line.
    """
    used: set[str] = set()
    empty = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for name, stored in source.tensors.items()
    }
    whole = weight_source(empty, build_rules(source.model, source.layout), used)
    faults: list[str] = []
    for shard in shards:
        if shard.key.startswith(source.fresh):
            continue
        try:
            check_vocabulary(source, shard)
            whole(shard)
        except CheckpointError as error:
            if str(error) not in faults:
                faults.append(str(error))
    unused = sorted(source.tensors.keys() - used)
    unknown = [name for name in unused if not is_ignored(name, source.model, source.layout)]
    if not faults:  # a missing tensor also makes others unused
        faults = [f"tensor {name} belongs to no part of this model" for name in unknown]
    if faults:
        more = [f"... and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise CheckpointError("\n".join(faults[:8] + more))
    return tuple(unused)


def _pieces(source: Source, run: RunConfig, shards: list[Shard]) -> list[Piece]:
    """List the pieces of the checkpoint; each is made when it is written."""
    weights, rules = source.weights(), build_rules(source.model, source.layout)
    num_layers = {shard.key: 0 for shard in shards}
    for shard in shards:
        num_layers[shard.key] += 1

    def piece(shard: Shard) -> Piece:
        is_fresh = shard.key.startswith(source.fresh)
        names = rules[shard.key].names(shard.layer)
        dtypes = {source.dtype} if is_fresh else {source.tensors[name].dtype for name in names}
        if len(dtypes) > 1:
            raise CheckpointError(f"{', '.join(names)} differ in dtype; they make one tensor")

        def load() -> torch.Tensor:
            whole = (
                fresh_weight(shard, run.model, seed=run.training.seed)
                if is_fresh
                else weights(shard)
            )
            assert whole is not None
            return whole

        return Piece(
            key=shard.key,
            shape=shard.shape,
            dtype=next(iter(dtypes)),
            load=load,
            layer=shard.layer,
            num_layers=num_layers[shard.key],
        )

    return [piece(shard) for shard in shards]
