"""Files of an input: folders, globs, S3 prefixes and splits.

a folder, "cc3m/*.tar", "{000..031}.tar", "s3://bucket/prefix/" --expand--> files
train-*, validation-*, test-*  --choose_split--> train alone; the others are named, never merged
"""

import functools
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from megatron_croc.data.prepare.inputs.base import InputFormat, InputNote
from megatron_croc.data.prepare.inputs.text_files import METADATA_NAMES
from megatron_croc.data.records.splits import ALL_SPLITS, split_of, wanted_splits
from megatron_croc.data.store.storage import is_remote, list_objects
from megatron_croc.errors import DataError

SUFFIXES: dict[str, InputFormat] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
    ".tar.bz2": "webdataset",
    ".tar.xz": "webdataset",
}

_NOT_RECORDS = re.compile(r"(dataset_infos?|state|.*_stats|manifest|report)\.json|skipped\.jsonl")
_PART = re.compile(r"(.*?)-?(\d{5})-of-(\d{5})(.*)")


@dataclass(kw_only=True)
class InputFiles:
    """Files of an input, in order."""

    files: list[str]
    notes: list[InputNote] = field(default_factory=list)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts of the path of each file below the folder or glob that was searched."""


def format_of(file: str) -> InputFormat | None:
    """Return the format that a file's suffix says; None: no known suffix."""
    name = file.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def find_files(
    paths: Sequence[str | Path],
    *,
    split: Sequence[str] = (),
    input_format: InputFormat | None = None,
) -> InputFiles:
    """Find the files of some paths.

    Args:
        paths: files, folders, globs and s3:// prefixes.
        split: names of the splits to take; "all": every one; empty: train.
        input_format: format of files without a known suffix.

    Raises:
        DataError: nothing is found, or a choice must be made; the message says which.
    """
    if not paths:
        raise DataError("no input is given")
    found = InputFiles(files=[])
    is_searched = False
    for path in (one for given in paths for one in _without_braces(str(given))):
        if is_remote(path) and (_is_glob(path) or format_of(path) is None):
            is_searched = True
            _add_folder(found, path, _remote_files(path), input_format)
        elif not is_remote(path) and Path(path).is_dir():
            is_searched = True
            _add_folder(found, path, sorted(_walk(Path(path))), input_format)
        elif not is_remote(path) and _is_glob(path) and not os.path.lexists(path):
            is_searched = True
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise DataError(f"input {path} matches no file")
            root = os.path.dirname(re.split(r"[*?\[]", path)[0])
            matches = [file for file in matches if not Path(file).is_dir()]
            found.parts |= {file: _relative(file, root) for file in matches}
            found.files += matches
        else:
            found.files.append(path)
    found.files = list(dict.fromkeys(found.files))
    _choose_split(found, split, is_searched, ", ".join(map(str, paths)))
    _note_missing_parts(found)
    return found


def _add_folder(
    found: InputFiles, folder: str, files: Sequence[str], input_format: InputFormat | None
) -> None:
    """Add the files of a folder that hold records."""
    root = re.split(r"[*?\[]", folder)[0]
    found.parts |= {file: _relative(file, root) for file in files}
    metadata = [file for file in files if PurePosixPath(file).name in METADATA_NAMES]
    others = [file for file in files if file not in metadata]
    kinds: dict[InputFormat, list[str]] = {}
    for file in others:
        kind = format_of(file)
        if kind is not None and not _NOT_RECORDS.fullmatch(PurePosixPath(file).name.lower()):
            kinds.setdefault(kind, []).append(file)
    tars = {_stem(file) for file in kinds.get("webdataset", ())}
    tables = kinds.get("parquet", [])
    if tars and tables and all(_stem(file) in tars for file in tables):
        # The downloader img2dataset writes them: the tar's records once more, without images.
        found.notes.append(
            InputNote("parquet files beside tars of their name: left out", tables[0])
        )
        del kinds["parquet"]
    larger: tuple[InputFormat, ...] = ("webdataset", "parquet")
    large: list[InputFormat] = [kind for kind in larger if kind in kinds]
    if metadata:
        large = [kind for kind in large if input_format is None or kind == input_format]
    if input_format is not None and input_format in kinds:
        found.files += kinds[input_format]
    elif metadata and not large:
        folders = [str(PurePosixPath(file).parent) for file in metadata]
        if len(set(folders)) < len(folders):
            raise DataError(f"{folder} holds several metadata files in one folder: name one file")
        found.files += metadata
    elif len(large) == 1 and not metadata:
        found.files += kinds[large[0]]
    elif not large and (texts := [file for some in kinds.values() for file in some]):
        if len(texts) > 1 and any(split_of(_relative(file, folder)) is None for file in texts):
            names = ", ".join(PurePosixPath(file).name for file in texts)
            raise DataError(
                f"input folder {folder} holds several files of records ({names:.120}): name those "
                "that are meant"
            )
        found.files += texts
    elif large:
        raise DataError(
            f"input folder {folder} holds records of several kinds "
            f"({', '.join([*large, *(['metadata'] if metadata else [])])}): name the files, or "
            "give the format"
        )
    elif any(file.lower().endswith(".arrow") for file in files):
        raise DataError(
            f"input folder {folder} was written by save_to_disk (.arrow): load it with datasets "
            "and write parquet (to_parquet)"
        )
    else:
        raise DataError(
            f"input folder {folder} holds no .parquet, no .tar, no metadata file and no JSON of "
            "records; texts of images belong into metadata.jsonl with file_name and text"
        )


def _choose_split(found: InputFiles, split: Sequence[str], is_searched: bool, where: str) -> None:
    """Keep the files of the chosen splits."""
    folders = {str(PurePosixPath(file).parent) for file in found.files}
    common = os.path.commonpath(folders) if len({is_remote(f) for f in found.files}) == 1 else ""
    groups: dict[str, list[str]] = {}
    for file in found.files:
        parts = found.parts.get(file) or _relative(file, common)
        groups.setdefault(split_of(parts) or "train", []).append(file)
    wanted = set(wanted_splits(split))
    there = ", ".join(f"{name} ({len(files)} files)" for name, files in groups.items())
    if ALL_SPLITS in wanted:
        if len(groups) > 1:
            found.notes.append(InputNote(f"splits merged as asked: {there}", ""))
        return
    if wanted:
        if missing := sorted(wanted - set(groups)):
            raise DataError(f"input {where} has no split {', '.join(missing)}, only {there}")
    elif len(groups) > 1 and not is_searched:
        raise DataError(
            f"input names files of several splits, {there}: choose with --split train, or merge "
            f"them with --split {ALL_SPLITS}"
        )
    elif is_searched and "train" not in groups:
        raise DataError(f"input {where} holds no split train, only {there}: choose with --split")
    else:
        wanted = {"train"} if len(groups) > 1 else set(groups)
    for name in groups:
        if name not in wanted:
            text = f"split {name} left out ({len(groups[name])} files): --split asks for it"
            found.notes.append(InputNote(text, groups[name][0]))
    found.files = [file for file in found.files if any(file in groups[name] for name in wanted)]


def _note_missing_parts(found: InputFiles) -> None:
    """Tell of a download that lacks some of the numbered parts of a split."""
    parts: dict[tuple[str, ...], int] = {}
    for file in found.files:
        if match := _PART.fullmatch(file):
            key = (match[1], match[3], match[4])
            parts[key] = parts.get(key, 0) + 1
    for (stem, total, _), count in parts.items():
        if count != int(total):
            found.notes.append(InputNote(f"only {count} of {int(total)} parts are there", stem))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder; hidden ones and links that lead in a circle are left out."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(root, name) for name in names if not name.startswith("."))


def _remote_files(path: str) -> list[str]:
    """Return the objects of an s3:// prefix or glob."""
    prefix = re.split(r"[*?\[]", path)[0]
    try:
        if prefix == path:
            return list_objects(path.rstrip("/") + "/")
        found = [file for file in list_objects(prefix) if fnmatchcase(file, path)]
    except OSError as error:
        raise DataError(f"input {path} cannot be listed: {error}") from error
    if not found:
        raise DataError(f"input {path} matches no object")
    return found


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _without_braces(path: str) -> list[str]:
    """Expand {000..031} and {a,b}, as webdataset's addresses have them."""
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None or Path(path).exists():
        return [path]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers[1], numbers[2]
        inside = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    elif "," in match[1]:
        inside = match[1].split(",")
    else:
        return [path]
    begin, end = path[: match.start()], path[match.end() :]
    return [whole for some in inside for whole in _without_braces(begin + some + end)]


def _stem(file: str) -> str:
    return re.sub(r"(\.tar)?\.[a-z0-9]+$", "", file.lower())


@functools.lru_cache(maxsize=1 << 16)
def _relative(file: str, folder: str) -> tuple[str, ...]:
    """Return the parts of a path below a folder."""
    path = PurePosixPath(file)
    return (
        path.relative_to(folder).parts if folder and path.is_relative_to(folder) else (path.name,)
    )
