"""Read the tensors of a Hugging Face directory, one at a time.

Supports model.safetensors and pytorch_model.bin, as one file or as several with an index. Headers
are checked when the directory is opened; data is read when a tensor is needed. No file can run
code: safetensors is plain data, and .bin files are loaded with torch's weights_only. torch is
imported only where data or a .bin file is read.
"""

import math
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_croc import file_reading
from megatron_croc.errors import CheckpointError, first_line
from megatron_croc.file_reading import UnreadableError
from megatron_croc.tensor_headers import TensorEntry, read_safetensors_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
"""torch's names of the dtypes of weights (and of old position_ids), by their safetensors names."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a file."""

    shape: tuple[int, ...]
    dtype_name: str
    """torch's name, such as float32."""

    item_bytes: int
    """Bytes of one number."""

    load: "Callable[[], Tensor]"
    """Reads the data."""

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype in memory, as in the file."""
        import torch

        return getattr(torch, self.dtype_name)


class LazyTensors(Mapping[str, "Tensor"]):
    """Mapping of stored tensors that reads a tensor at each access and keeps none."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        """Args: stored: tensors by name."""
        self.stored = stored

    def __getitem__(self, name: str) -> "Tensor":
        """Read one tensor."""
        return self.stored[name].load()

    def __contains__(self, name: object) -> bool:
        """Return True if there is a tensor of this name, without reading it."""
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.stored)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.stored)


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Open all tensors of a directory, by name, without reading data.

    Raises:
        CheckpointError: no weights, or a file is missing, damaged, or holds more than tensors.
    """
    for stem, suffix, open_file in (
        ("model", "safetensors", _open_safetensors),
        ("pytorch_model", "bin", _open_pickle),
    ):
        index, whole = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.exists():
            return _open_indexed(index, open_file)
        if whole.exists():
            return open_file(whole)
    raise CheckpointError(
        f"{folder}: no weights there (model.safetensors or pytorch_model.bin, or their index)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; CheckpointError if missing or not an object."""
    try:
        return file_reading.read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except UnreadableError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _open_indexed(
    index: Path, open_file: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Open the tensors of all files of an index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: names {file}, which is not beside it")
        tensors.update(open_file(index.parent / file))
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: tensor {name} is not in {file}")
    return tensors


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Open a safetensors file, whose header is checked as strictly as by its own library."""
    try:
        entries = read_safetensors_header(path)
    except (OSError, UnreadableError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {name: _stored(path, name, entry) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: TensorEntry) -> StoredTensor:
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} is {entry.dtype}; only {', '.join(DTYPES)} are read"
        )
    dtype_name, num_bytes = DTYPES[entry.dtype], entry.end - entry.begin
    if num_bytes != math.prod(entry.shape) * _ITEM_BYTES[dtype_name]:
        raise CheckpointError(f"{path}: tensor {name}: {num_bytes} bytes for shape {entry.shape}")

    def load() -> "Tensor":
        import torch

        dtype = getattr(torch, dtype_name)
        if not num_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        numbers = np.fromfile(path, np.uint8, count=num_bytes, offset=entry.begin)
        return torch.from_numpy(numbers).view(dtype).reshape(entry.shape)

    return StoredTensor(
        shape=entry.shape, dtype_name=dtype_name, item_bytes=_ITEM_BYTES[dtype_name], load=load
    )


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    """Open a .bin file, memory-mapped if its format allows; accepts tensors only."""
    import torch
    from torch import Tensor

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and is not loaded, since such a file can run code; "
            f"convert it to safetensors where you trust it ({first_line(error)})"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        tensors[name] = StoredTensor(
            shape=tuple(tensor.shape),
            dtype_name=str(tensor.dtype).removeprefix("torch."),
            item_bytes=tensor.itemsize,
            load=lambda kept=tensor: kept,
        )
    return tensors
