"""The demo data set on disk: images, LLaVA-style JSON for every stage, and a tokenizer.

images/000000.jpg ...                      the last HELD_OUT_SHARE of them for validation only
pretrain_mlp.json        valid_pretrain_mlp.json      short captions
pretrain_croc.json       valid_pretrain_croc.json     detailed captions
finetune.json            valid_finetune.json          questions; text-only and two-image ones
tokenizer.model                                       SentencePiece, made like LLaMA's
"""

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from megatron_croc.atomic_files import write_atomically
from megatron_croc.data.demo import text as demo_text
from megatron_croc.data.demo.scenes import Scene, render_scene, sample_scene
from megatron_croc.data.sample.tokenizer_training import PROMPT, train_sentencepiece
from megatron_croc.errors import DataError

HELD_OUT_SHARE = 0.05
TEXT_ONLY_SHARE = 0.08
TWO_IMAGE_SHARE = 0.08
MIN_IMAGES = 40
"""Fewest images; gives two held-out images."""

VOCAB_SIZE = 512
TOKENIZER_SCENES = 600
"""Number of scenes whose texts train the tokenizer; independent of the number of images."""


def image_name(index: int) -> str:
    """Return the file name of an image, relative to the image folder."""
    return f"{index:06d}.jpg"


def write_images(folder: Path, num_images: int, *, seed: int, num_workers: int) -> Iterator[int]:
    """Draw all images; yield the index of each when its file is written."""
    if num_images < MIN_IMAGES:
        raise DataError(f"num_images = {num_images}: make at least {MIN_IMAGES}")
    folder.mkdir(parents=True, exist_ok=True)
    draw = partial(_write_image, folder, seed)
    if num_workers <= 1:
        yield from map(draw, range(num_images))
        return
    # spawn: forking a process that has threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        yield from pool.map(draw, range(num_images), chunksize=64)


def _write_image(folder: Path, seed: int, index: int) -> int:
    (folder / image_name(index)).write_bytes(render_scene(sample_scene(seed, index)))
    return index


def write_annotations(folder: Path, num_images: int, *, seed: int) -> dict[str, int]:
    """Write the JSON of every stage, for training and for validation.

    Returns:
        File name -> number of records.
    """
    num_held_out = round(num_images * HELD_OUT_SHARE)
    splits = {
        "": range(num_images - num_held_out),
        "valid_": range(num_images - num_held_out, num_images),
    }
    counts = {}
    for prefix, indices in splits.items():
        for stage, build in STAGES.items():
            records = build(indices, seed)
            name = f"{prefix}{stage}.json"
            write_atomically(folder / name, (json.dumps(records, indent=0) + "\n").encode())
            counts[name] = len(records)
    return counts


def train_tokenizer(*, seed: int) -> bytes:
    """Train a small SentencePiece model on the demo's texts."""
    texts = [PROMPT] * TOKENIZER_SCENES
    for build in STAGES.values():
        for record in build(range(TOKENIZER_SCENES), seed):
            texts += [message["value"] for message in record["conversations"]]
    return train_sentencepiece(texts, VOCAB_SIZE)


def _caption_records(
    describe: Callable[[Scene, random.Random], demo_text.Messages], indices: range, seed: int
) -> list[dict]:
    return [
        {
            "id": f"{describe.__name__}-{index}",
            "image": image_name(index),
            "conversations": describe(
                sample_scene(seed, index), _rng(seed, describe.__name__, index)
            ),
        }
        for index in indices
    ]


def _finetune_records(indices: range, seed: int) -> list[dict]:
    """Make one record per index: of one image, of two images, or of text only."""
    records = []
    for index in indices:
        rng = _rng(seed, "finetune", index)
        scene, draw = sample_scene(seed, index), rng.random()
        if draw < TEXT_ONLY_SHARE:
            record = {"conversations": demo_text.text_only(rng)}
        elif draw < TEXT_ONLY_SHARE + TWO_IMAGE_SHARE:
            other = index + 1 if index + 1 in indices else indices[0]
            images = [image_name(index), image_name(other)]
            messages = demo_text.comparison(scene, sample_scene(seed, other), rng)
            record = {"image": images, "conversations": messages}
        else:
            messages = demo_text.questions(scene, rng)
            record = {"image": image_name(index), "conversations": messages}
        records.append({"id": f"finetune-{index}", **record})
    return records


def _rng(seed: int, purpose: str, index: int) -> random.Random:
    return random.Random(f"{purpose}/{seed}/{index}")


STAGES = {
    "pretrain_mlp": partial(_caption_records, demo_text.short_caption),
    "pretrain_croc": partial(_caption_records, demo_text.detailed_caption),
    "finetune": _finetune_records,
}
"""Training stage -> function (indices, seed) -> records of these images."""
