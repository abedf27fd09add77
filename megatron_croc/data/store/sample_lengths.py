"""Stored lengths of samples: text tokens and images, read from a dataset folder's tables.

    lengths-<digest>-<template>.npy    int32 [samples, 2]: (text tokens, images) of each sample

`data/prepare/lengths.py` writes one table for each pair of tokenizer and template. A local table is
mapped into memory: looking up a few samples among 10^9 reads a few pages.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from megatron_croc.config.data import TemplateName
from megatron_croc.data.sample.tokenization import Tokenizer
from megatron_croc.data.store.manifest import read_manifest
from megatron_croc.data.store.shard_writer import sha256_of
from megatron_croc.data.store.storage import join_location
from megatron_croc.data.store.stored_array import let_go, open_array
from megatron_croc.errors import DataError, first_line

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")

_LOOKED_UP_AT_ONCE = 512
"""Rows of a table that are looked up at once; each may map 64 KiB, together 32 MiB."""


class SampleLengths:
    """Text tokens and images of the samples of several folders, numbered through."""

    def __init__(
        self, folders: Sequence[str], tokenizer: Tokenizer, template: TemplateName
    ) -> None:
        """Open the tables of this tokenizer and template.

        Raises:
            DataError: a folder has no such table, or a damaged one.
        """
        digest = tokenizer_digest(tokenizer)
        found = [_open_table(f, tokenizer.name, digest, template) for f in folders]
        self._tables = [table for _, table in found]
        self.digest = hashlib.sha256("".join(sha for sha, _ in found).encode()).hexdigest()[:16]
        """Digest of all tables, 16 hex digits."""
        self._starts = np.array(list(accumulate(map(len, self._tables), initial=0)))

    def __call__(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up samples, int64 [m]; return text tokens and images, int64 [m] each."""
        found = np.empty((len(index), 2), dtype=np.int64)
        folder = np.searchsorted(self._starts, index, side="right") - 1
        for number, table in enumerate(self._tables):
            here = np.flatnonzero(folder == number)
            found[here] = look_up(table, index[here] - self._starts[number])
        return found[:, 0], found[:, 1]


def look_up(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Look up rows of a mapped table, int64 [m, columns]; unmaps the pages that were read."""
    found = np.empty((len(rows), table.shape[1]), dtype=np.int64)
    for begin in range(0, len(rows), _LOOKED_UP_AT_ONCE):
        part = slice(begin, begin + _LOOKED_UP_AT_ONCE)
        found[part] = table[rows[part]]
        let_go(table)
    return found


def _open_table(
    folder: str, name: str, digest: str, template: TemplateName
) -> tuple[str, np.ndarray]:
    """Open a folder's table; also return its digest."""
    manifest = read_manifest(folder)
    again = (
        f"run: croc data lengths {folder} --tokenizer-model {name} "
        f"--conversation-template {template}"
    )
    for info in manifest.lengths:
        if (info.tokenizer_sha256, info.conversation_template) == (digest, template):
            break
    else:
        made = [f"{i.tokenizer_model} with {i.conversation_template}" for i in manifest.lengths]
        raise DataError(
            f"data_path {folder} has no sample lengths for tokenizer {name} with template "
            f"{template} (it has {'; '.join(made) or 'none at all'}), and packing, grouping "
            f"and balancing need them; {again}"
        )
    path = join_location(folder, info.file)
    try:
        table = open_array(path)
    except (EOFError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}; {again}") from error
    if table.shape != (manifest.num_samples, 2) or table.dtype != np.int32:
        raise DataError(
            f"{path} holds {table.dtype} {table.shape}, not one row for each of the "
            f"{manifest.num_samples} samples; {again}"
        )
    return info.sha256, table


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Compute the hex digest of a tokenizer: its files and its legacy flag, which fix the ids."""
    path = Path(tokenizer.name)
    files = [path / name for name in _TOKENIZER_FILES] if path.is_dir() else [path]
    digests = [sha256_of(file) for file in files if file.is_file()]
    return hashlib.sha256(f"{digests} legacy={tokenizer.legacy}".encode()).hexdigest()
