"""Micro-batches made from numbers, for tests of everything behind the loader."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.ops.mixed_mask import MixedMask
from megatron_croc.ops.patch_selection import image_seed, select_replaced

TEXT = 9
"""Text tokens between images."""


def tiny_run(stage: str = "pretrain_croc", **changes: object) -> RunConfig:
    """The tiny recipe, smaller still, with `changes` to leaf settings (`lr=1e-3`)."""
    from megatron_croc.config.settings import set_setting, settings_of
    from megatron_croc.recipes import get_recipe

    run = get_recipe(f"tiny/{stage}")
    run.model.vision_tower.img_size = 56
    run.model.vision_tower.vision_num_layers = 3
    run.model.vision_tower.vision_hidden_size = 32
    run.model.vision_tower.vision_ffn_hidden_size = 64
    run.model.language_model.hidden_size = 64
    run.model.language_model.ffn_hidden_size = 96
    run.model.language_model.vocab_size = 128
    run.model.prompt_pool.pool_size = 32
    run.training.micro_batch_size = 2
    run.training.global_batch_size = 8
    paths = {setting.path.rsplit(".", 1)[-1]: setting.path for setting in settings_of(RunConfig)}
    for name, value in changes.items():
        set_setting(run, paths[name], value)  # type: ignore[arg-type]
    return run


def make_sample(run: RunConfig, number: int, num_images: int) -> dict:
    """Sample `number` with `num_images` images: tokens, labels, pixels; a pure function."""
    rng = np.random.default_rng((run.training.seed, number))
    n_visual = run.model.vision_tower.num_visual_tokens
    vocab = run.model.language_model.vocab_size
    ids: list[int] = []
    starts: list[int] = []
    for _ in range(num_images):
        ids += rng.integers(1, vocab, int(rng.integers(2, TEXT))).tolist()
        starts.append(len(ids))
        ids += [IMAGE_TOKEN_INDEX] * n_visual
    answer = int(rng.integers(4, 2 * TEXT))
    ids += rng.integers(1, vocab, TEXT + answer).tolist()
    first_label = len(ids) - answer
    labels = [IGNORE_INDEX] * first_label + ids[first_label:]
    size = run.model.vision_tower.img_size
    pixels = rng.integers(0, 256, (num_images, 3, size, size), dtype=np.uint8)
    return {
        "id": f"sample-{number}",
        "ids": ids,
        "labels": [*labels[1:], IGNORE_INDEX],
        "starts": starts,
        "first_label": first_label,
        "pixels": torch.from_numpy(pixels),
    }


def make_batch(run: RunConfig, samples: Sequence[dict], *, multiple_of: int = 4) -> Batch:
    """One packed row of samples."""
    n_visual = run.model.vision_tower.num_visual_tokens
    mask_type = run.model.attention_mask_type
    cu, ids, labels, positions = [0], [], [], []
    starts: list[int] = []
    spans: list[tuple[int, int]] = []
    seeds: list[int] = []
    for sample in samples:
        offset = len(ids)
        ids += sample["ids"]
        labels += sample["labels"]
        positions += range(len(sample["ids"]))
        cu.append(len(ids))
        starts += [offset + start for start in sample["starts"]]
        seeds += [
            image_seed(seed=run.training.seed, epoch=0, sample_id=sample["id"], image_index=i)
            for i in range(len(sample["starts"]))
        ]
        if mask_type == "visual":
            spans += [(offset + s, offset + s + n_visual) for s in sample["starts"]]
        elif mask_type == "prefix":
            spans.append((offset, offset + sample["first_label"]))
    padding = -len(ids) % multiple_of
    ids += [0] * padding
    labels += [IGNORE_INDEX] * padding
    positions += [0] * padding
    ratio = run.model.prompt_pool.replace_ratio
    replaced = [select_replaced(n_visual, ratio, seed=seed) for seed in seeds]
    size = run.model.vision_tower.img_size
    return Batch(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        position_ids=torch.tensor(positions),
        mixed_mask=MixedMask.build(cu, spans, length=len(ids)),
        image_starts=torch.tensor(starts, dtype=torch.int64),
        replaced=torch.from_numpy(np.array(replaced, dtype=bool).reshape(-1, n_visual)),
        image_seeds=tuple(seeds),
        pixel_values=torch.cat([s["pixels"] for s in samples] or [torch.empty(0, 3, size, size)]),
        sample_ids=tuple(sample["id"] for sample in samples),
    )


def make_step(
    run: RunConfig, step: int, *, dp_rank: int, dp_size: int, images: Sequence[int]
) -> list[Batch]:
    """This replica's micro-batches of optimizer step `step`; the global batch ignores dp_size.

    `images` gives the number of images of each sample, cycled over the global batch.
    """
    training = run.training
    batches = []
    for first in range(0, training.global_batch_size, training.micro_batch_size * dp_size):
        begin = first + dp_rank * training.micro_batch_size
        numbers = range(begin, begin + training.micro_batch_size)
        samples = [
            make_sample(run, step * training.global_batch_size + n, images[n % len(images)])
            for n in numbers
        ]
        batches.append(make_batch(run, samples))
    return batches
