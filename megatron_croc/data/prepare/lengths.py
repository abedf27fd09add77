"""Measure the length of every sample of a dataset folder, without decoding its images.

    conversations --tokenizer, template--> lengths-<digest>-<template>.npy   int32 [samples, 2]
                                                                             (text tokens, images)
    tokens of a sample = text tokens + images * N, at most seq_length

A table belongs to one tokenizer and template; a dataset folder may hold several tables.
`data/store/sample_lengths.py` reads them.
"""

import hashlib
import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from megatron_croc.atomic_files import write_atomically
from megatron_croc.config.data import TemplateName, TokenizerType
from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.sample.tokenization import build_tokenizer, tokenize_conversation
from megatron_croc.data.store.manifest import read_manifest
from megatron_croc.data.store.sample_lengths import tokenizer_digest
from megatron_croc.data.store.shard_writer import LengthsInfo, add_lengths
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.ops.special_ids import IMAGE_TOKEN_INDEX

CHUNK = 10_000
"""Number of samples of one job of a worker process."""


def index_lengths(
    folder: Path,
    *,
    tokenizer_type: TokenizerType,
    tokenizer_model: str,
    template: TemplateName,
    num_workers: int = 1,
) -> Iterator[int]:
    """Measure the samples of a dataset folder, write their table and add it to the manifest.

    A sample that cannot be tokenised gets one token and no image, the length of the placeholder
    that training uses for it.

    Yields:
        Number of samples measured since the previous value.

    Raises:
        DataError: the folder holds no finished dataset, or the tokenizer cannot be loaded.
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
    """Measure some samples, int32 [m, 2]: (text tokens, images); runs in a worker process."""
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
