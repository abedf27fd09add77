"""Write a megatron-core checkpoint (torch_dist) piece by piece; each is made when it is written.

torch's writer keeps all tensors of a file until the file is closed, so a file is closed after
MAX_FILE_BYTES. Memory is bounded by the pieces of one file, for any model size.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_croc.checkpoint.writer import BACKENDS, BACKENDS_FILE
from megatron_croc.errors import CheckpointError

MAX_FILE_BYTES = 256 * 2**20
"""Largest size of a file; a larger tensor has a file of its own."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of the checkpoint, or one layer of it."""

    key: str
    shape: tuple[int, ...]
    """Shape of the piece; the tensor of a stack of layers is [num_layers, *shape]."""

    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Makes the tensor of the piece."""

    layer: int | None = None
    num_layers: int = 1

    @property
    def num_bytes(self) -> int:
        """Size of the piece in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Offset and size of the piece in the tensor of its key."""
        first = () if self.layer is None else (self.layer,)
        offsets = (*first, *(0 for _ in self.shape))
        sizes = (*(1 for _ in first), *self.shape)
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))

    @property
    def item(self) -> WriteItem:
        """Write item of the piece, for torch's planner."""
        chunk = self.chunk
        stack = () if self.layer is None else (self.num_layers,)
        return WriteItem(
            index=MetadataIndex(self.key, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk,
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size((*stack, *self.shape)),
            ),
        )


def write_checkpoint(
    folder: Path,
    pieces: Sequence[Piece],
    objects: dict[str, Any],
    *,
    on_piece: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write the pieces, and small objects by key, in megatron-core's format.

    Args:
        folder: existing empty directory.
        pieces: all pieces of every key, in any order.
        objects: megatron's extra states, [state] each; a strict load needs them.
        on_piece: called with the size of each piece when it is made.

    Raises:
        OSError: writing failed, for example because the disk is full.
        CheckpointError: making a piece failed.
    """
    try:
        dcp.save(
            {},
            storage_writer=_Writer(folder, single_file_per_rank=True, thread_count=1),
            planner=_Planner(pieces, objects, on_piece),
            no_dist=True,
        )
    except CheckpointException as error:  # a BaseException around the cause
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError | CheckpointError):
            raise cause from error
        raise CheckpointError(f"{folder}: cannot be written: {cause}") from error
    torch.save({}, folder / "common.pt")
    (folder / BACKENDS_FILE).write_text(json.dumps(BACKENDS))


class _Planner(SavePlanner):
    """Save planner: lists the items of the pieces, and makes each piece when it is written."""

    def __init__(
        self, pieces: Sequence[Piece], objects: dict[str, Any], on_piece: Callable[[int], object]
    ) -> None:
        self.pieces = {(piece.key, piece.chunk.offsets): piece for piece in pieces}
        assert len(self.pieces) == len(pieces)
        self.objects = objects
        self.on_piece = on_piece

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Prepare nothing: there is no state dict."""

    def create_local_plan(self) -> SavePlan:
        """Plan every piece and every object."""
        items = [piece.item for piece in self.pieces.values()]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the local plan: there is one process."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make one piece; a layer has shape [1, *shape]."""
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save(self.objects[index.fqn], stream)
            return stream
        assert index.offset is not None
        piece = self.pieces[index.fqn, index.offset]
        tensor = piece.load().to(piece.dtype)
        assert tuple(tensor.shape) == piece.shape, piece.key
        self.on_piece(piece.num_bytes)
        return tensor.reshape(piece.chunk.sizes).contiguous()


class _Writer(dcp.FileSystemWriter):
    """torch's writer, which starts a new file after MAX_FILE_BYTES."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write each group of items to its own file."""
        results: list[WriteResult] = []
        prefix = type(plan.storage_data)
        for number, group in enumerate(_groups(plan.items)):
            part = replace(plan, items=group, storage_data=prefix(f"__{number}_"))
            results += super().write_data(part, planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _groups(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Split the items, in order, into groups of at most one file."""
    groups: list[list[WriteItem]] = [[]]
    filled = 0
    for item in items:
        size = 0
        if (data := item.tensor_data) is not None:
            size = data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if groups[-1] and filled + size > MAX_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups
