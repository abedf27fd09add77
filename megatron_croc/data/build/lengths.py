"""How long every sample is, known before any image is decoded.

    conversations --tokenizer, template--> lengths-<digest>-<template>.npy   int32 [samples, 2]
                                                         |                   (text tokens, images)
    tokens of a sample in a row = text tokens + images * N, at most seq_length

A table belongs to one tokenizer and template; a dataset folder may hold several. It is mapped into
memory, so looking up a few samples of 10^9 reads a few pages.
"""

import hashlib
import io
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_croc.atomic_files import write_atomically
from megatron_croc.config.data import TemplateName
from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.tokenization import Tokenizer, build_tokenizer, tokenize_conversation
from megatron_croc.data.store.manifest import read_manifest
from megatron_croc.data.store.shard_writer import (
    LengthsInfo,
    add_lengths,
    sha256_of,
)
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.data.store.storage import join_location
from megatron_croc.data.store.stored_array import let_go, open_array
from megatron_croc.errors import DataError, first_line

TokenizerType = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")

_LOOKED_UP_AT_ONCE = 512
"""Each looked-up row may map 64 KiB: 32 MiB at most."""

CHUNK = 10_000
"""Samples that one worker process takes at a time."""


class SampleLengths:
    """Text tokens and images of any sample of some folders, one after the other."""

    def __init__(
        self, folders: Sequence[str], tokenizer: Tokenizer, template: TemplateName
    ) -> None:
        """Map the tables that were made with this tokenizer and template.

        Raises:
            DataError: a folder has none, or one that was damaged.
        """
        digest = tokenizer_digest(tokenizer)
        self._tables = [_open_table(f, tokenizer.name, digest, template) for f in folders]
        self._starts = np.array(list(accumulate(map(len, self._tables), initial=0)))

    def __call__(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Text tokens and images, int64 [m] each, of samples int64 [m]."""
        found = np.empty((len(index), 2), dtype=np.int64)
        folder = np.searchsorted(self._starts, index, side="right") - 1
        for number, table in enumerate(self._tables):
            here = np.flatnonzero(folder == number)
            found[here] = look_up(table, index[here] - self._starts[number])
        return found[:, 0], found[:, 1]


def look_up(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a mapped table; what was mapped for it is let go, so memory stays small."""
    found = np.empty((len(rows), table.shape[1]), dtype=np.int64)
    for begin in range(0, len(rows), _LOOKED_UP_AT_ONCE):
        part = slice(begin, begin + _LOOKED_UP_AT_ONCE)
        found[part] = table[rows[part]]
        let_go(table)
    return found


def _open_table(folder: str, name: str, digest: str, template: TemplateName) -> np.ndarray:
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
            f"{template} (it has {'; '.join(made) or 'none at all'}), and packing and grouping "
            f"need them; {again}"
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
    return table


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Hex digest of what decides about the ids: the tokenizer's files and its legacy flag."""
    path = Path(tokenizer.name)
    files = [path / name for name in _TOKENIZER_FILES] if path.is_dir() else [path]
    digests = [sha256_of(file) for file in files if file.is_file()]
    return hashlib.sha256(f"{digests} legacy={tokenizer.legacy}".encode()).hexdigest()


def index_lengths(
    folder: Path,
    *,
    tokenizer_type: TokenizerType,
    tokenizer_model: str,
    template: TemplateName,
    num_workers: int = 1,
) -> Iterator[int]:
    """Write a dataset folder's lengths and enter them in its manifest, at the end.

    A sample that cannot be tokenised gets one token and no image: so long is what stands in its
    place in training.

    Yields:
        Samples done since the last time.

    Raises:
        DataError: the folder holds no finished dataset, or the tokenizer is no tokenizer.
    """
    num_samples = read_manifest(folder).num_samples
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    ranges = [range(b, min(b + CHUNK, num_samples)) for b in range(0, num_samples, CHUNK)]
    table = np.empty((num_samples, 2), dtype=np.int32)
    arguments = (folder, tokenizer_type, tokenizer_model, template)
    if num_workers <= 1 or len(ranges) == 1:
        results = (_measure(r, *arguments) for r in ranges)
        for samples, part in zip(ranges, results, strict=True):
            table[samples.start : samples.stop] = part
            yield len(samples)
    else:
        # spawn: forking a process that has threads (tokenizers, torch) can deadlock.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
            jobs = [pool.submit(_measure, r, *arguments) for r in ranges]
            for samples, job in zip(ranges, jobs, strict=True):
                table[samples.start : samples.stop] = job.result()
                yield len(samples)
    digest = tokenizer_digest(tokenizer)
    name = f"lengths-{digest[:12]}-{template}.npy"
    buffer = io.BytesIO()
    np.save(buffer, table)
    write_atomically(folder / name, buffer.getvalue())
    info = LengthsInfo(
        file=name,
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        tokenizer_sha256=digest,
        tokenizer_model=Path(tokenizer_model).name,
        conversation_template=template,
    )
    add_lengths(folder, info)


def _measure(
    samples: range,
    folder: Path,
    tokenizer_type: TokenizerType,
    tokenizer_model: str,
    template: TemplateName,
) -> np.ndarray:
    """int32 [m, 2]: text tokens and images of some samples; runs in a worker process."""
    dataset = ShardedDataset(folder)
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    found = np.empty((len(samples), 2), dtype=np.int32)
    for place, index in enumerate(samples):
        try:
            sample_id, messages, num_images = dataset.read_conversations(index)
            ids = tokenize_conversation(
                tokenizer, template, messages, num_images=num_images, sample_id=sample_id
            ).input_ids
            found[place] = np.count_nonzero(ids != IMAGE_TOKEN_INDEX), num_images
        except BadSampleError:
            found[place] = 1, 0
    return found
