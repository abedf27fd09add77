"""Packing: every token in its place, labels inside their sample, masks as released."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.collate import (
    ReadySample,
    collate,
    expand_sample,
    placeholder_sample,
)
from megatron_croc.data.sample.tokenization import TokenizedSample
from megatron_croc.ops.patch_selection import image_seed, select_replaced

N = 4  # visual tokens per image
IMAGE_SHAPE = (3, 2, 2)


def tokenized(ids, labels=None, sample_id="set/0"):
    labels = [IGNORE_INDEX] * len(ids) if labels is None else labels
    return TokenizedSample(
        sample_id=sample_id,
        input_ids=np.array(ids, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
    )


def pack(samples, mask_type="visual", pad_to_multiple_of=1, num_visual_tokens=N, **options):
    options = {"seed": 1, "replace_ratio": None, "image_shape": None} | options
    return collate(
        samples,
        num_visual_tokens=num_visual_tokens,
        mask_type=mask_type,
        pad_to_multiple_of=pad_to_multiple_of,
        **options,
    )


def ready(ids, labels=None, *, sample_id="set/0", seq_length=1000, epoch=0, pixels=0):
    tokens = expand_sample(
        tokenized(ids, labels, sample_id), num_visual_tokens=N, seq_length=seq_length
    )
    images = [torch.full(IMAGE_SHAPE, i + 1, dtype=torch.uint8) for i in range(pixels)]
    return ReadySample(tokens=tokens, epoch=epoch, pixel_values=images)


MARK = IMAGE_TOKEN_INDEX

token = st.one_of(st.integers(1, 99), st.just(MARK))
sample_ids_and_labels = st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(sample_ids_and_labels, min_size=1, max_size=4),
    mask_type=st.sampled_from(["causal", "visual", "prefix"]),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_packed_row(rows, mask_type, multiple):
    samples = [
        ready(
            [t for t, _ in row],
            [t if said and t != MARK else IGNORE_INDEX for t, said in row],
            sample_id=f"set/{i}",
        )
        for i, row in enumerate(rows)
    ]
    batch = pack(samples, mask_type, multiple)
    cu = batch.mixed_mask.cu_seqlens.tolist()
    assert len(batch.input_ids) == batch.mixed_mask.length
    assert len(batch.input_ids) % multiple == 0
    assert len(batch.input_ids) - cu[-1] < multiple
    assert (batch.labels[cu[-1] :] == IGNORE_INDEX).all()

    visible = batch.mixed_mask.visible()
    expected_starts = []
    for sample, begin, end in zip(samples, cu, cu[1:], strict=False):
        ids, labels = sample.tokens.input_ids, sample.tokens.labels
        assert batch.input_ids[begin:end].tolist() == ids.tolist()
        assert batch.labels[begin:end].tolist() == [*labels[1:].tolist(), IGNORE_INDEX]
        position = 0
        while position < len(ids):
            if ids[position] == MARK:
                expected_starts.append(begin + position)
                position += N
            else:
                position += 1
        # The mask, restated from its meaning: key k is visible to query q.
        q, k = np.meshgrid(np.arange(len(ids)), np.arange(len(ids)), indexing="ij")
        expected = k <= q
        if mask_type == "visual":
            image = np.full(len(ids), -1)
            for number, start in enumerate(expected_starts):
                if start >= begin:
                    image[start - begin : start - begin + N] = number
            expected |= (image[q] == image[k]) & (image[q] >= 0)
        elif mask_type == "prefix" and any(t == MARK for row in rows for t, _ in row):
            supervised = np.flatnonzero(labels != IGNORE_INDEX)
            if len(supervised):
                expected |= (k < supervised[0]) & (q < supervised[0])
        np.testing.assert_array_equal(visible[begin:end, begin:end].numpy(), expected)
    assert batch.image_starts.tolist() == expected_starts
    assert batch.replaced.shape == (len(expected_starts), N)
    assert not batch.replaced.any()


@pytest.mark.parametrize("case", ["mha_stage15", "mha_stage15_image_plus_textonly"])
def test_released_labels_and_mask(golden_dir, case):
    golden = load_file(golden_dir / "croc" / f"{case}.safetensors")
    samples = []
    for row, real in enumerate(golden["in_attention_mask"]):
        tokens = tokenized(
            *(golden[name][row][real].tolist() for name in ("in_input_ids", "in_labels"))
        )
        tokens = expand_sample(tokens, num_visual_tokens=16, seq_length=1000)
        samples.append(ReadySample(tokens=tokens, epoch=0))
    batch = pack(samples, "prefix", num_visual_tokens=16)
    visible = batch.mixed_mask.visible()
    cu = batch.mixed_mask.cu_seqlens.tolist()
    for row, (begin, end) in enumerate(pairwise(cu)):
        length = end - begin
        real = golden["merged_attention_mask"][row]
        assert length == int(real.sum())
        assert batch.labels[begin : end - 1].equal(golden["merged_labels"][row][1:length])
        image = golden["merged_image_pos"][row][:length].bool()
        assert (batch.input_ids[begin:end] == IMAGE_TOKEN_INDEX).equal(image)
        released = golden["layer_attention_visible"][row, 0, :length, :length].bool()
        assert visible[begin:end, begin:end].equal(released)


def test_touching_images_and_pixels_stay_apart():
    batch = pack(
        [ready([1, MARK, MARK, 2], pixels=2), ready([3]), ready([MARK], pixels=1)],
        image_shape=IMAGE_SHAPE,
    )
    assert batch.image_starts.tolist() == [1, 5, 11]
    assert batch.mixed_mask.spans.tolist() == [[1, 5], [5, 9], [11, 15]]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1, 2, 1]


def test_a_batch_without_images_has_empty_pixels():
    batch = pack([ready([1, 2], [IGNORE_INDEX, 2])], "prefix", image_shape=IMAGE_SHAPE)
    assert batch.pixel_values.shape == (0, *IMAGE_SHAPE)
    assert batch.replaced.shape == (0, N)
    assert batch.mixed_mask.spans.shape == (0, 2)  # as released: nothing to see, plain causal


def test_replaced_sets_follow_sample_and_image_not_the_batch():
    options = {"replace_ratio": 0.75, "seed": 5}
    first = ready([MARK, 7, MARK], sample_id="set/1", epoch=2)
    other = ready([MARK], sample_id="set/2", epoch=2)
    together, alone = pack([other, first], **options), pack([first], **options)
    assert together.replaced[1:].equal(alone.replaced)
    assert together.image_seeds[1:] == alone.image_seeds
    for image_index, row in enumerate(alone.replaced):
        seed = image_seed(seed=5, epoch=2, sample_id="set/1", image_index=image_index)
        assert alone.image_seeds[image_index] == seed
        np.testing.assert_array_equal(row.numpy(), select_replaced(N, 0.75, seed=seed))
        assert row.sum() == 3


def test_text_is_cut_at_the_end_and_images_never():
    sample = tokenized([1, MARK, 2, 3, 4], [IGNORE_INDEX, IGNORE_INDEX, 2, 3, 4])
    cut = expand_sample(sample, num_visual_tokens=N, seq_length=6)
    assert cut.input_ids.tolist() == [1, *[MARK] * N, 2]
    assert cut.labels.tolist() == [*[IGNORE_INDEX] * 5, 2]
    for too_short in (0, 1, 4):
        with pytest.raises(BadSampleError, match="set/0") as caught:
            expand_sample(sample, num_visual_tokens=N, seq_length=too_short)
        assert caught.value.kind == "too_long"
    assert len(expand_sample(sample, num_visual_tokens=N, seq_length=5).input_ids) == 5


def test_placeholder_teaches_nothing():
    sample = ReadySample(tokens=placeholder_sample("set/9"), epoch=0)
    batch = pack([ready([MARK, 5], [IGNORE_INDEX, 5]), sample], "prefix")
    assert batch.sample_ids == ("set/0", "set/9")
    assert batch.num_label_tokens == 1
    assert batch.mixed_mask.spans.tolist() == [[0, 4]]
