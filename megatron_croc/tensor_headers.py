"""Headers of safetensors and .npy files, read without their data and checked against their size."""

import ast
import math
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from megatron_croc.file_reading import UnreadableError, parse_json

MAX_HEADER_BYTES = 100_000_000
"""Largest safetensors header, as in the safetensors library."""


class TensorEntry(NamedTuple):
    """Entry of one tensor in a safetensors header."""

    dtype: str
    """Name such as BF16."""

    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""

    end: int
    """Byte after the last one."""


def read_safetensors_header(path: str | Path) -> dict[str, TensorEntry]:
    """Read the tensors' names and places of a safetensors file, as strictly as the library does.

    The data of all tensors must fill the file: no overlap, no gap, nothing behind the last one.

    Raises:
        OSError: it cannot be read.
        UnreadableError: names the first tensor that is wrong.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UnreadableError(f"truncated or not safetensors ({size} bytes)")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise UnreadableError("damaged safetensors header: no JSON object")
    start = 8 + length
    tensors: dict[str, TensorEntry] = {}
    for name, entry in cast(dict[str, Any], header).items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise UnreadableError(f"damaged safetensors header: tensor {name:.80} has no dtype")
        shape: Any = entry.get("shape")
        offsets: Any = entry.get("data_offsets")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise UnreadableError(
                f"damaged safetensors header: tensor {name:.80} has shape {shape!r:.40} and "
                f"offsets {offsets!r:.40}"
            )
        tensors[name] = TensorEntry(
            entry["dtype"], tuple(shape), start + offsets[0], start + offsets[1]
        )
    _check_places(tensors, start, size)
    return tensors


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_places(tensors: dict[str, TensorEntry], start: int, size: int) -> None:
    """Require that the tensors fill the bytes from `start` to `size`, one behind the other."""
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.end > size:
            raise UnreadableError(
                f"truncated: tensor {name:.80} ends at byte {entry.end}, the file has {size}"
            )
        if entry.begin != end or entry.end < entry.begin:
            raise UnreadableError(
                f"damaged safetensors header: tensor {name:.80} is in bytes {entry.begin} to "
                f"{entry.end}, and the one before it ends at {end}"
            )
        end = entry.end
    if end != size:
        raise UnreadableError(f"{size - end} bytes behind the last tensor belong to none")


def check_npy_header(file: BinaryIO, size: int) -> None:
    """Check the header of a .npy file against its size, and go back to the start.

    Args:
        file: open at its start.
        size: bytes of the file.

    Raises:
        UnreadableError: no .npy file of plain numbers, or its shape does not fit its size.
    """
    magic = file.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2):
        raise UnreadableError("not a .npy file")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > 10_000:
        raise UnreadableError(f"its header claims {length} bytes")
    try:
        header = ast.literal_eval(file.read(length).decode("latin1").strip())
        descr, shape = header["descr"], header["shape"]
        if set(header) != {"descr", "shape", "fortran_order"}:
            raise KeyError(set(header))
        if not isinstance(header["fortran_order"], bool):
            raise TypeError("fortran_order")
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise UnreadableError("damaged .npy header") from error
    kind = re.fullmatch(r"[<>|=][biufc]([0-9]{1,2})", descr) if isinstance(descr, str) else None
    if kind is None:
        raise UnreadableError(f"holds {descr!r:.40}, not plain numbers")
    if not isinstance(shape, tuple) or not _are_counts(list(shape)):
        raise UnreadableError(f"has the shape {shape!r:.40}")
    needed = file.tell() + math.prod(shape) * int(kind[1])
    if needed != size:
        raise UnreadableError(f"has {size} bytes; its shape {shape!r:.40} needs {needed}")
    file.seek(0)
