"""Choice of the input class for the paths that a user gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_croc.data.prepare.inputs.base import InputFormat, RecordInput
from megatron_croc.data.prepare.inputs.parquet import ParquetInput
from megatron_croc.data.prepare.inputs.tars import TarInput
from megatron_croc.data.prepare.inputs.text_files import JsonInput, JsonlInput
from megatron_croc.data.store.storage import is_remote
from megatron_croc.errors import DataError

FORMATS: tuple[InputFormat, ...] = get_args(InputFormat)

_SUFFIXES: dict[str, InputFormat] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "webdataset",
}


def open_input(paths: Sequence[str | Path], input_format: InputFormat | None = None) -> RecordInput:
    """Open the input of some paths.

    Args:
        paths: a file, several files of one kind, or a folder of parquet files or tars.
        input_format: format of the files; None: given by their suffix.

    Raises:
        DataError: no file, an unknown suffix, several formats, or an unusable file.
    """
    files = expand_folders(paths)
    if input_format is None:
        kinds: set[InputFormat | None] = {
            _SUFFIXES.get(Path(file).suffix.lower()) for file in files
        }
        told: InputFormat | None = kinds.pop()
        if kinds or told is None:
            raise DataError(
                f"input {', '.join(map(str, paths))}: files must have one suffix of "
                f"{', '.join(_SUFFIXES)}; give the format ({', '.join(FORMATS)})"
            )
        input_format = told
    if input_format in ("json", "jsonl"):
        if len(files) != 1:
            raise DataError(f"{input_format} input is one file, got {len(files)}: join them")
        kind = JsonInput if input_format == "json" else JsonlInput
        return kind(Path(files[0]))
    if input_format == "parquet":
        return ParquetInput([Path(file) for file in files])
    return TarInput(files)


def expand_folders(paths: Sequence[str | Path]) -> list[str]:
    """Replace folders by their parquet files and tars, in order of name.

    Raises:
        DataError: a folder without such files, or no path.
    """
    files: list[str] = []
    for path in map(str, paths):
        if is_remote(path) or not Path(path).is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in Path(path).iterdir() if p.suffix in (".parquet", ".tar"))
        if not inside:
            raise DataError(f"input folder {path} holds no .parquet and no .tar file")
        files += map(str, inside)
    if not files:
        raise DataError("no input is given")
    return files
