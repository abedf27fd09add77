"""Parameter shards: the parts of whole, layout-independent tensors that a model chunk holds.

megatron's sharded state dict has the global key, layer, shape and offset of each parameter. Initial
weights, imported weights and gathered gradients all use these, and so do not depend on the layout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Parameter shard: one contiguous block of one whole tensor."""

    key: str
    """Global name, equal at any layout; the layer is not part of it."""

    layer: int | None
    """Global layer index, if layers share the key; else None."""

    shape: tuple[int, ...]
    """Shape of the whole tensor (of one layer)."""

    block: tuple[slice, ...]
    """Position of the block in the whole tensor, one slice per dim."""

    data: Tensor
    """View of the parameter, or of the tensor that `pick` returned for it."""

    @property
    def name(self) -> str:
        """Unique name of the whole tensor."""
        return self.key if self.layer is None else f"{self.key}#{self.layer}"


WeightSource = Callable[[Shard], Tensor | None]
"""Function from a shard to its whole tensor; None leaves the shard unchanged."""


def iter_shards(
    chunk: nn.Module, pick: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter
) -> Iterator[Shard]:
    """Iterate over the shards of this rank.

    Args:
        chunk: model chunk.
        pick: returns the tensor to use for a parameter, of its shape, or None to skip it.
    """
    state = chunk.sharded_state_dict()  # type: ignore[operator]
    for entry in nested_values(state):
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue
        value = pick(entry.data)  # type: ignore[arg-type]
        if value is None:
            continue
        if isinstance(entry, ShardedTensor):
            yield _shard(entry, value)
            continue
        pieces = entry.build_fn(entry.key, value, entry.replica_id, entry.flattened_range)
        for piece in nested_values(pieces):
            yield _shard(piece, piece.data)


def _shard(entry: ShardedTensor, data: Tensor) -> Shard:
    stacked = entry.prepend_axis_num
    assert stacked <= 1
    shape = tuple(entry.global_shape[stacked:])
    offset = entry.global_offset[stacked:]
    size = entry.local_shape
    return Shard(
        key=entry.key,
        layer=entry.global_offset[0] if stacked else None,
        shape=shape,
        block=tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True)),
        data=data,
    )


@torch.no_grad()
def fill_weights(chunk: nn.Module, source: WeightSource) -> None:
    """Copy this rank's block of every whole tensor from `source` into the parameters."""
    for shard in iter_shards(chunk):
        whole = source(shard)
        if whole is None:
            continue
        if tuple(whole.shape) != shard.shape:
            raise ValueError(f"{shard.name}: got {tuple(whole.shape)}, need {shard.shape}")
        shard.data.copy_(whole[shard.block])
