"""Choice of the input class for the paths that a user gives."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from megatron_croc.data.prepare.inputs.base import InputFormat, RecordInput
from megatron_croc.data.prepare.inputs.files import SUFFIXES, find_files, format_of
from megatron_croc.data.prepare.inputs.joined import JoinedInput
from megatron_croc.data.prepare.inputs.parquet import ParquetInput
from megatron_croc.data.prepare.inputs.tars import TarInput
from megatron_croc.data.prepare.inputs.text_files import CsvInput, JsonInput, JsonlInput
from megatron_croc.data.store.storage import is_remote
from megatron_croc.errors import DataError

FORMATS: tuple[InputFormat, ...] = get_args(InputFormat)

_LOCAL: dict[InputFormat, Callable[[Path], RecordInput]] = {
    "json": JsonInput,
    "jsonl": JsonlInput,
    "csv": CsvInput,
    "parquet": ParquetInput,
}
_LFS_POINTER = b"version https://git-lfs"


def open_input(
    paths: Sequence[str | Path],
    input_format: InputFormat | None = None,
    *,
    split: Sequence[str] = (),
) -> RecordInput:
    """Open the input of some paths.

    Args:
        paths: files, folders, globs, or s3:// prefixes of tars.
        input_format: format of the files; None: given by their suffix.
        split: splits to take (find_files).

    Raises:
        DataError: no file, an unknown suffix, or an unusable file.
    """
    found = find_files(paths, split=split, input_format=input_format)
    inputs = [_open_file(file, input_format) for file in found.files]
    return JoinedInput(inputs, found.notes)


def _open_file(file: str, input_format: InputFormat | None) -> RecordInput:
    told = input_format or format_of(file)
    if told is None:
        packed = format_of(file.lower().removesuffix(".gz").removesuffix(".zst"))
        way = "decompress it" if packed else f"give the format ({', '.join(FORMATS)})"
        raise DataError(f"input {file}: files must have one suffix of {', '.join(SUFFIXES)}; {way}")
    _refuse_pointer(file)
    if told == "webdataset":
        return TarInput(file)
    if is_remote(file):
        raise DataError(f"input {file}: {told} is read from local disks: copy it to one first")
    return _LOCAL[told](Path(file))


def _refuse_pointer(file: str) -> None:
    """Refuse the small text that stands for a large file that Git LFS has not fetched."""
    if is_remote(file):
        return
    try:
        with open(file, "rb") as opened:
            head = opened.read(len(_LFS_POINTER))
    except OSError:
        return  # told by the reader of its format
    if head == _LFS_POINTER:
        raise DataError(f"input {file} is a pointer of Git LFS, not the file: run git lfs pull")
