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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from megatron_croc.atomic_files import write_atomically
from megatron_croc.config.data import TemplateName, TokenizerType
from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.sample.collate import measure_extent
from megatron_croc.data.sample.tokenization import build_tokenizer, tokenize_conversation
from megatron_croc.data.sample.tokenizer_check import announce_tokenizer
from megatron_croc.data.store.manifest import read_manifest
from megatron_croc.data.store.sample_lengths import tokenizer_digest
from megatron_croc.data.store.shard_writer import LengthsInfo, add_lengths
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.data.truncation import TruncationCount
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
    num_visual_tokens: int = 0,
    truncation: Sequence[TruncationCount] = (),
) -> Iterator[int]:
    """Measure the samples of a dataset folder, write their table and add it to the manifest.

    A sample that cannot be tokenised gets one token and no image, the length of the placeholder
    that training uses for it.

    Args:
        folder: dataset folder.
        tokenizer_type: library of the tokenizer.
        tokenizer_model: file or folder of the tokenizer.
        template: conversation template.
        num_workers: processes.
        num_visual_tokens: N, visual tokens of an image; only `truncation` depends on it.
        truncation: counts of some values of seq_length; all samples are added to them.

    Yields:
        Number of samples measured since the previous value.

    Raises:
        DataError: the folder holds no finished dataset, or the tokenizer cannot be loaded.
    """
    num_samples = read_manifest(folder).num_samples
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    announce_tokenizer(tokenizer, template)
    ranges = [range(b, min(b + CHUNK, num_samples)) for b in range(0, num_samples, CHUNK)]
    table = np.empty((num_samples, 2), dtype=np.int32)
    seq_lengths = [count.seq_length for count in truncation]
    arguments = (
        folder, tokenizer_type, tokenizer_model, template, num_visual_tokens, seq_lengths
    )  # fmt: skip

    def keep(samples: range, found: tuple[np.ndarray, list[TruncationCount]]) -> int:
        table[samples.start : samples.stop] = found[0]
        for count, more in zip(truncation, found[1], strict=True):
            count.merge(more)
        return len(samples)

    if num_workers <= 1 or len(ranges) == 1:
        results = (_measure(r, *arguments) for r in ranges)
        for samples, found in zip(ranges, results, strict=True):
            yield keep(samples, found)
    else:
        # spawn: forking a process that has threads (tokenizers, torch) can deadlock.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
            jobs = [pool.submit(_measure, r, *arguments) for r in ranges]
            for samples, job in zip(ranges, jobs, strict=True):
                yield keep(samples, job.result())
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
        legacy=tokenizer.legacy,
    )
    add_lengths(folder, info)


def _measure(
    samples: range,
    folder: Path,
    tokenizer_type: TokenizerType,
    tokenizer_model: str,
    template: TemplateName,
    num_visual_tokens: int,
    seq_lengths: Sequence[int],
) -> tuple[np.ndarray, list[TruncationCount]]:
    """Measure some samples; runs in a worker process.

    Returns:
        int32 [m, 2]: (text tokens, images), and what each of `seq_lengths` cuts off.
    """
    truncation = [TruncationCount(seq_length) for seq_length in seq_lengths]
    dataset = ShardedDataset(folder)
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    found = np.empty((len(samples), 2), dtype=np.int32)
    for place, index in enumerate(samples):
        try:
            sample_id, messages, num_images = dataset.read_conversations(index)
            sample = tokenize_conversation(
                tokenizer, template, messages, num_images=num_images, sample_id=sample_id
            )
            text_tokens = np.count_nonzero(sample.input_ids != IMAGE_TOKEN_INDEX)
            found[place] = text_tokens, num_images
            if truncation:
                extent = measure_extent(sample, num_visual_tokens=num_visual_tokens)
                for count in truncation:
                    count.add(extent)
        except BadSampleError:
            found[place] = 1, 0
    return found, truncation
