"""Read a megatron-core checkpoint (torch_dist) tensor by tensor, saved at any layout.

Needs no model and no process group, and runs no code from the files (checkpoint/safe_reading.py).
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_croc.checkpoint.safe_reading import read_index
from megatron_croc.errors import CheckpointError, first_line


class CheckpointReader:
    """Tensors of one checkpoint folder, keyed by megatron's global keys."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            CheckpointError: the index is missing or damaged.
        """
        self.folder = folder
        self._metadata = read_index(folder)
        self._reader = dcp.FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, True)
        self.tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a saved tensor."""
        return self.tensors[key].properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor, including the dimension of layers."""
        return tuple(self.tensors[key].size)

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """Read one whole tensor, or one layer of it, assembled from the pieces of all ranks.

        Raises:
            CheckpointError: a file is missing or damaged, or the pieces leave a gap.
        """
        entry, shape = self.tensors[key], self.shape(key)
        stacked = layer is not None
        offsets = (layer, *(0 for _ in shape[1:])) if stacked else (0,) * len(shape)
        sizes = (1, *shape[1:]) if stacked else shape
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        if sum(item.lengths.numel() for item in items) != math.prod(sizes):
            raise CheckpointError(f"{self.folder}: {key} is not complete, layer {layer}")
        whole = torch.empty(sizes, dtype=entry.properties.dtype)  # as large as its pieces
        try:
            self._reader.read_data(LoadPlan(items), _Planner(whole)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder}: {key} cannot be read: {first_line(error)}"
            ) from error
        return whole[0] if stacked else whole


class _Planner(LoadPlanner):
    """Load planner that copies every piece into its place in one tensor."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        """Prepare nothing."""

    def create_local_plan(self) -> LoadPlan:
        """Not used: the plan is passed to the reader directly."""
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Not used: the plan is passed to the reader directly."""
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Not used: the plan is passed to the reader directly."""
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Not supported: only tensors are read."""
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the whole that a piece covers."""
        block = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.whole[tuple(slice(start, start + length) for start, length in block)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Ignore the tensor: the piece was copied into the whole directly."""
