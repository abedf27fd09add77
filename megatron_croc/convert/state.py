"""Weights and gradients of a model under Hugging Face names, at any parallel layout."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_croc.convert.names import Rule
from megatron_croc.errors import CheckpointError
from megatron_croc.model.sharded_weights import Shard, WeightSource, fill_weights, iter_shards

_TABLES = (
    "language_model.embedding.word_embeddings.weight",
    "language_model.output_layer.weight",
    "reconstruction_head.position_embeddings.weight",
)


def load_state(
    chunk: nn.Module, tensors: Mapping[str, Tensor], rules: Mapping[str, Rule]
) -> set[str]:
    """Load tensors under Hugging Face names into a model chunk.

    Returns:
        Names that were used on this rank.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    used: set[str] = set()
    fill_weights(chunk, weight_source(tensors, rules, used))
    return used


def weight_source(
    tensors: Mapping[str, Tensor], rules: Mapping[str, Rule], used: set[str]
) -> WeightSource:
    """Return a function that makes whole megatron tensors of Hugging Face tensors, one at a time.

    Args:
        tensors: by Hugging Face name; may be lazy, as each is read when it is needed.
        rules: the name map.
        used: set to which the names of read tensors are added.

    Raises:
        CheckpointError: by the returned function: a tensor is missing or has another shape.
    """

    def whole(shard: Shard) -> Tensor:
        rule = rules[shard.key]
        names = rule.names(shard.layer)
        for name in names:
            if name not in tensors:
                raise CheckpointError(f"tensor {name} is missing ({shard.name} is made of it)")
        used.update(names)
        parts = [tensors[name] for name in names]
        try:
            packed = rule.operation.pack(parts)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise CheckpointError(
                f"{', '.join(names)}: shapes {shapes} do not make {shard.name} {shard.shape}"
            ) from error
        return _fit_rows(packed, shard, names)

    return whole


def _fit_rows(packed: Tensor, shard: Shard, names: tuple[str, ...]) -> Tensor:
    """Cut or pad a table to our rows: unused positions are cut, vocabulary padding is added."""
    rows = shard.shape[0]
    if shard.key in _TABLES and packed.shape[1:] == shard.shape[1:] and packed.shape[0] != rows:
        padding = max(rows - packed.shape[0], 0)
        packed = torch.nn.functional.pad(packed, (0, 0, 0, padding))[:rows]
    if tuple(packed.shape) != shard.shape:
        raise CheckpointError(
            f"{', '.join(names)}: shape {tuple(packed.shape)} of {shard.name} does not fit this "
            f"model's {shard.shape}"
        )
    return packed


def gather_state(
    chunks: Sequence[nn.Module],
    rules: Mapping[str, Rule],
    pick: Callable[[nn.Parameter], Tensor | None],
) -> dict[str, Tensor]:
    """Gather whole tensors under Hugging Face names on every rank; for small models only.

    Args:
        chunks: this rank's unwrapped model chunks.
        rules: the name map.
        pick: parameter -> tensor to gather (itself, its gradient, ...); None skips it.
    """
    mine = [
        (shard.key, shard.layer, shard.shape, shard.block, shard.data.detach().float().cpu())
        for chunk in chunks
        for shard in iter_shards(chunk, pick)
    ]
    everyone: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    wholes: dict[tuple[str, int | None], Tensor] = {}
    for key, layer, shape, block, data in (piece for pieces in everyone for piece in pieces):
        whole = wholes.setdefault((key, layer), torch.zeros(shape))
        whole[block] = data  # replicas have equal values
    state: dict[str, Tensor] = {}
    for (key, layer), whole in wholes.items():
        rule = rules[key]
        parts = rule.operation.unpack(whole)
        state.update(zip(rule.names(layer), parts, strict=True))
    return state
