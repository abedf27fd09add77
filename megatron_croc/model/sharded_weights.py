"""Every parameter of a model chunk as pieces of whole, layout-independent tensors.

megatron's sharded state dict knows, for each parameter, its global key, layer, shape and offset.
Fresh weights, weights from other formats and gathered gradients are all written in those terms,
so none of them can depend on how the model is cut.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One contiguous block of one whole tensor."""

    key: str
    """Global name, the same at any layout (layers are an index, not part of the name)."""

    layer: int | None
    """Global layer index where the key is shared by the layers of a stack."""

    shape: tuple[int, ...]
    """Shape of the whole tensor (of one layer)."""

    block: tuple[slice, ...]
    """Where this piece lies in it."""

    data: Tensor
    """The piece: a view of the parameter, or of what `pick` returned for it."""

    @property
    def name(self) -> str:
        """Unique name of the whole tensor."""
        return self.key if self.layer is None else f"{self.key}#{self.layer}"


WeightSource = Callable[[Shard], Tensor | None]
"""Gives the whole tensor a shard belongs to; None leaves the shard as it is."""


def iter_shards(
    chunk: nn.Module, pick: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter
) -> Iterator[Shard]:
    """Pieces held by this rank; `pick` may choose a tensor of the same shape, or None to skip."""
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
    """Copy this rank's piece of every whole tensor that `source` gives into the parameters."""
    for shard in iter_shards(chunk):
        whole = source(shard)
        if whole is None:
            continue
        if tuple(whole.shape) != shard.shape:
            raise ValueError(f"{shard.name}: got {tuple(whole.shape)}, need {shard.shape}")
        shard.data.copy_(whole[shard.block])
