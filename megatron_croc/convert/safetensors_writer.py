"""Write sharded safetensors files tensor by tensor, with one tensor in memory.

Offsets are computed from shapes before any data is read. safetensors.torch.save_file needs all
tensors of a file at once, and copies them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_croc.convert.tensor_files import DTYPES

_NAMES = {getattr(torch, dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that are made together and stored in one file."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    load: Callable[[], list[Tensor]]
    """Makes the tensors, in the order of `names`, of any float dtype."""

    @property
    def num_bytes(self) -> int:
        """Size in the file in bytes."""
        return sum(math.prod(shape) for shape in self.shapes) * self.dtype.itemsize


def write_sharded(
    folder: Path,
    groups: Sequence[Group],
    *,
    max_shard_bytes: int,
    on_group: Callable[[int], object],
) -> dict[str, str]:
    """Write model-0000x-of-0000y.safetensors and their index.

    Args:
        folder: existing directory.
        groups: groups in the order of writing.
        max_shard_bytes: largest size of a file; a group is never split.
        on_group: called with the size of each group after it is written.

    Returns:
        File name -> SHA-256 of the file.
    """
    shards = list(_cut(groups, max_shard_bytes))
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        digests[file] = _write_file(folder / file, shard, on_group)
        weight_map.update({name: file for group in shard for name in group.names})
    total = sum(group.num_bytes for group in groups)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return digests


def _cut(groups: Sequence[Group], max_shard_bytes: int) -> Iterator[list[Group]]:
    shard: list[Group] = []
    for group in groups:
        if shard and sum(g.num_bytes for g in (*shard, group)) > max_shard_bytes:
            yield shard
            shard = []
        shard.append(group)
    if shard:
        yield shard


def _write_file(path: Path, groups: Sequence[Group], on_group: Callable[[int], object]) -> str:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for group in groups:
        for name, shape in zip(group.names, group.shapes, strict=True):
            start, end = end, end + math.prod(shape) * group.dtype.itemsize
            header[name] = {
                "dtype": _NAMES[group.dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for group in groups:
            made = group.load()
            for shape, tensor in zip(group.shapes, made, strict=True):
                assert tuple(tensor.shape) == shape
                numbers = tensor.to(group.dtype).contiguous().reshape(-1).view(torch.uint8)
                write(numbers.numpy().data)
            on_group(group.num_bytes)
    return digest.hexdigest()
