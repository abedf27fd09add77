"""Damage to the files of a run: checkpoints and shards."""

import os
import tarfile
from pathlib import Path


def truncate_checkpoint(save: Path) -> None:
    """Cut the largest file of the latest checkpoint in half."""
    _cut_in_half(_payload(save))


def flip_bit(save: Path) -> None:
    """Flip one bit of the largest file of the latest checkpoint."""
    path = _payload(save)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_images(shard: Path, count: int) -> None:
    """Overwrite the first `count` images of a shard with zeros."""
    with tarfile.open(shard) as archive:
        images = [member for member in archive if not member.name.endswith(".json")]
    with shard.open("r+b") as file:
        for image in images[:count]:
            file.seek(image.offset_data)
            file.write(bytes(image.size))


def truncate_shard(shard: Path) -> None:
    """Cut a shard in half."""
    _cut_in_half(shard)


def _payload(save: Path) -> Path:
    """Largest file of the checkpoint of step 4."""
    files = [path for path in (save / "iter_0000004").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def _cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
