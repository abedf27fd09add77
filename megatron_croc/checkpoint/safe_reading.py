"""Reading of torch_dist checkpoints without executing code from their files.

torch stores the index of a checkpoint (.metadata) and its objects as pickles, and loads them in a
way that can call any function. Here the index may use only the classes that an index needs, stored
objects are never opened (megatron's extra states, all None), and common.pt and tensors are loaded
with torch's restricted unpickler. megatron's reader and planner are replaced for the whole process
(docs/design.md, "State that belongs to the whole process").
"""

import io
import pickle
from collections.abc import Collection
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
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import ReadItem

from megatron_croc.checkpoint.manifest import INDEX_FILE
from megatron_croc.errors import CheckpointError, first_line

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
    # megatron stores the ranks' plans beside the tensors.
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}
"""Classes allowed in an index, by module; torch dtypes are allowed too."""


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that allows only the classes of an index."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return an allowed class; raise UnpicklingError for any other."""
        allowed = global_name in _INDEX_CLASSES.get(module_name, ())
        if not allowed and not (module_name == "torch" and _is_dtype(global_name)):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} does not belong there")
        return super().find_class(module_name, global_name)


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def read_index(folder: Path) -> Metadata:
    """Read the index: names, shapes and files of a checkpoint's tensors.

    Raises:
        CheckpointError: the index is missing or damaged, uses a class that is not allowed, or
            names a file outside its folder.
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
    try:
        _check_places(index, path)
        _check_tensors(index, path)
    except CheckpointError:
        raise
    except Exception as error:  # parts of any kind, or lacking
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    return index


def _check_places(index: Metadata, path: Path) -> None:
    """Refuse files outside the folder, and bytes that a file does not have."""
    folder = path.parent
    sizes: dict[str, int] = {}
    for place in index.storage_data.values():
        name = place.relative_path if isinstance(place, _StorageInfo) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{path}: damaged: names {name!r:.80}, which is not in its folder"
            )
        ends = (place.offset, place.length)
        if name not in sizes:  # a file that is missing is reported where it is read
            file = folder / name
            sizes[name] = file.stat().st_size if file.is_file() else 2**63
        if not all(type(n) is int and n >= 0 for n in ends) or sum(ends) > sizes[name]:
            raise CheckpointError(
                f"{path}: damaged: names bytes {place.offset!r:.40} + {place.length!r:.40} of "
                f"{name}, which has {sizes[name]}"
            )


def _check_tensors(index: Metadata, path: Path) -> None:
    """Refuse shapes that are none, and pieces that lie outside of their tensor."""
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(key, str) or not isinstance(entry.properties.dtype, torch.dtype):
            raise CheckpointError(f"{path}: damaged: {key!r:.80} is no tensor of a known type")
        shape = _lengths(entry.size)
        for chunk in entry.chunks:
            begins, sizes = _lengths(chunk.offsets), _lengths(chunk.sizes)
            ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
            if any(end > size for end, size in zip(ends, shape, strict=True)):
                raise CheckpointError(
                    f"{path}: damaged: a piece of {key!r:.80} ends at {ends}, its shape is {shape}"
                )


def _lengths(numbers: Collection[object]) -> list[int]:
    """Return lengths; ValueError: one is negative or no whole number."""
    lengths = [n for n in numbers if type(n) is int and 0 <= n < 2**63]
    if len(lengths) != len(numbers):
        raise ValueError(f"{numbers!r:.80} are no lengths")
    return lengths


def tensor_files(index: Metadata) -> set[str]:
    """Names of the files that an index finds its tensors in."""
    return {place.relative_path for place in (index.storage_data or {}).values()}


class _Reader(FileSystemReader):
    """torch's reader, with the index read safely and once."""

    def __init__(self, folder: str | Path, *_: object, **__: object) -> None:
        super().__init__(folder)
        self._index: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the index."""
        if self._index is None:
            self._index = read_index(Path(self.path))
            if getattr(self._index, "storage_meta", None) is None:
                self._index.storage_meta = StorageMeta()
        return self._index


class _Planner(torch_strategies.MCoreLoadPlanner):
    """megatron's planner, restricted to tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse a stored object; our state never asks for one."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is a stored object, not a tensor")


def load_state(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill sharded state from a checkpoint, as `dist_checkpointing.load` does, but safely.

    Args:
        content: megatron's sharded state, tensors only (no ShardedObject).
        folder: a checkpoint.

    Raises:
        CheckpointError: common.pt holds objects other than plain values and tensors.
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
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a torn file raises almost anything
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
