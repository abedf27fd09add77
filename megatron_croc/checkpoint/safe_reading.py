"""Read torch_dist checkpoints without running anything that a file could name.

torch keeps a checkpoint's index (.metadata) and stored objects as pickles, and loads them in a way
that calls whatever they name. Here an index is built from the few classes an index is made of,
stored objects are never opened (megatron's extra states, all None), and what common.pt and tensors
are made of is torch's own restricted list.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_croc.errors import CheckpointError, first_line

INDEX_FILE = ".metadata"
COMMON_FILE = "common.pt"

_INDEX_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    # megatron keeps the ranks' plans beside the tensors.
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}
"""What an index may be made of, by module; dtypes of torch too."""


class _IndexUnpickler(pickle.Unpickler):
    """Builds an index's own classes and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """The class of that name, where an index may hold it."""
        allowed = global_name in _INDEX_CLASSES.get(module_name, ())
        if not allowed and not (module_name == "torch" and _is_dtype(global_name)):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} does not belong there")
        return super().find_class(module_name, global_name)


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def read_index(folder: Path) -> Metadata:
    """The names, shapes and places of a checkpoint's tensors.

    Raises:
        CheckpointError: none there, damaged, or naming anything but an index's own classes and
            files of its own folder.
    """
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {folder} is not a checkpoint") from error
    except Exception as error:  # a torn pickle raises almost anything
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path}: damaged: holds a {type(index).__name__}")
    for place in (index.storage_data or {}).values():
        name = place.relative_path if isinstance(place, _StorageInfo) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path}: damaged: names {name!r}, which is not in its folder")
    return index


class _Reader(FileSystemReader):
    """torch's reader with an index read safely, once."""

    def __init__(self, folder: str | Path, *_: object, **__: object) -> None:
        super().__init__(folder)
        self._index: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index."""
        if self._index is None:
            self._index = read_index(Path(self.path))
            if getattr(self._index, "storage_meta", None) is None:
                self._index.storage_meta = StorageMeta()
        return self._index


class _Planner(torch_strategies.MCoreLoadPlanner):
    """megatron's planner, which opens tensors only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never asked for by our state; a checkpoint cannot make it."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is a stored object, not a tensor")


def load_state(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill sharded state from a checkpoint; what `dist_checkpointing.load` does, safely.

    Args:
        content: megatron's sharded state, tensors only (no ShardedObject).
        folder: a checkpoint.

    Raises:
        CheckpointError: common.pt holds more than plain values and tensors.
    """
    torch_strategies._get_filesystem_reader = _Reader  # type: ignore[assignment]
    torch_strategies.MCoreLoadPlanner = _Planner  # type: ignore[misc]
    sharded, local, factories = load_preprocess(content)
    state = _read_common(folder / COMMON_FILE)
    merge(state, local)
    sharded, _ = extract_sharded_base(sharded)
    merge(state, torch_strategies.TorchDistLoadShardedStrategy().load(sharded, folder))
    return apply_factory_merges(state, factories)  # type: ignore[arg-type]


def _read_common(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged: holds more than numbers, names and tensors, so it could run code"
        ) from error
