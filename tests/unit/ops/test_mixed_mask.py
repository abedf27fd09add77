"""Intervals and dense mask against the definition, spelled out pair by pair."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.collate import ReadySample, collate
from megatron_croc.data.sample.tokenization import TokenizedSample
from megatron_croc.errors import DataError
from megatron_croc.ops.mixed_mask import MixedMask
from tests.support.masks import lay_out, rows


def defined_visible(cu, spans, length):
    """May row q look at key k? The documented rule and nothing else."""
    sample_of, span_of = [None] * length, [None] * length
    for number, (begin, end) in enumerate(pairwise(cu)):
        sample_of[begin:end] = [number] * (end - begin)
    for number, (begin, end) in enumerate(spans):
        span_of[begin:end] = [number] * (end - begin)

    def sees(q, k):
        if sample_of[q] is None:  # padding looks at itself
            return k == q
        if sample_of[q] != sample_of[k]:
            return False
        return k <= q or (span_of[q] is not None and span_of[q] == span_of[k])

    return torch.tensor([[sees(q, k) for k in range(length)] for q in range(length)])


@given(rows)
@settings(max_examples=150, deadline=None)
def test_visible_is_the_definition(row):
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    assert torch.equal(mask.visible(), defined_visible(cu, spans, length))
    assert mask.num_samples == len(row[0])
    assert mask.max_seqlen == max(sum(n for n, _ in pieces) for pieces in row[0])


@given(rows)
@settings(max_examples=100, deadline=None)
def test_intervals_ascend_and_hold_every_visible_key(row):
    cu, spans, length = lay_out(*row)
    start, end = MixedMask.build(cu, spans, length=length).intervals()
    assert start.shape == end.shape == (length,)
    assert (start.diff() >= 0).all() and (end.diff() >= 0).all()
    position = torch.arange(length)
    assert (start <= position).all() and (end > position).all()
    visible = defined_visible(cu, spans, length)
    assert torch.equal(end - start, visible.sum(dim=1))  # no gap inside an interval
    assert torch.equal(start, visible.int().argmax(dim=1))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_prefix_is_one_span_from_the_start_of_the_sample(prefix, rest, padding):
    length = prefix + rest
    mask = MixedMask.build([0, length], [(0, prefix)], length=length + padding)
    visible = mask.visible()[:length, :length]
    q, k = torch.arange(length)[:, None], torch.arange(length)
    # visible(q, k) = k < p or k <= q, as the released code builds it.
    assert torch.equal(visible, (k < prefix) | (k <= q))
    assert not mask.visible()[:length, length:].any()


def test_without_spans_it_is_the_lower_triangle():
    mask = MixedMask.build([0, 7])
    assert torch.equal(mask.visible(), torch.ones(7, 7).tril().bool())
    assert mask.length == 7


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_no_labelled_position_sees_the_token_it_predicts(data):
    """Through the real collate: random turns and images, both kinds of mixed mask."""
    num_visual_tokens = 3
    samples = []
    for number in range(data.draw(st.integers(1, 3))):
        ids, labels = [5], [IGNORE_INDEX]
        for _ in range(data.draw(st.integers(1, 3))):
            for _ in range(data.draw(st.integers(0, 2))):
                ids += [IMAGE_TOKEN_INDEX] * num_visual_tokens
                labels += [IGNORE_INDEX] * num_visual_tokens
            for supervised in (False, True):
                count = data.draw(st.integers(1, 4))
                ids += [7] * count
                labels += [7 if supervised else IGNORE_INDEX] * count
        tokens = TokenizedSample(
            sample_id=str(number),
            input_ids=np.array(ids, dtype=np.int64),
            labels=np.array(labels, dtype=np.int64),
        )
        samples.append(ReadySample(tokens=tokens, epoch=0))
    for mask_type in ("visual", "prefix"):
        batch = collate(
            samples,
            num_visual_tokens=num_visual_tokens,
            mask_type=mask_type,
            pad_to_multiple_of=4,
            seed=0,
            replace_ratio=None,
            image_shape=None,
        )
        labelled = torch.nonzero(batch.labels != IGNORE_INDEX).flatten()
        assert labelled.numel()
        visible = batch.mixed_mask.visible()
        assert not visible[labelled, labelled + 1].any(), mask_type
        _, end = batch.mixed_mask.intervals()
        assert (end[labelled] <= labelled + 1).all()


@pytest.mark.parametrize(
    ("cu", "length", "message"),
    [
        ([0], None, "cu_seqlens must begin with 0 and contain a sample, got [0]"),
        ([1, 4], None, "cu_seqlens must begin with 0 and contain a sample, got [1, 4]"),
        ([0, 4, 4], None, "sample second: cu_seqlens give it the tokens [4, 4), but"),
        ([0, 5, 3], None, "sample second: cu_seqlens give it the tokens [5, 3), but"),
        ([0, 3, 5], 4, "sample second: cu_seqlens end it at 5, past the pack's 4 positions"),
        ([0, 3, 5, 7], None, "cu_seqlens [0, 3, 5, 7] contain 3 samples, not 2"),
    ],
)
def test_wrong_boundaries_are_refused_with_sample_and_values(cu, length, message):
    with pytest.raises(DataError) as error:
        MixedMask.build(cu, length=length, sample_ids=["first", "second"])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(3, 3)], "sample first: span [3, 3) is empty"),
        ([(4, 2)], "sample first: span [4, 2) is empty"),
        ([(4, 8)], "sample first: span [4, 8) is not inside the sample's tokens [0, 6)"),
        ([(-1, 2)], "sample first: span [-1, 2) is not inside the sample's tokens [0, 6)"),
        ([(7, 11)], "sample second: span [7, 11) is not inside the sample's tokens [6, 10)"),
        ([(12, 14)], "sample second: span [12, 14) is not inside the sample's tokens [6, 10)"),
        ([(1, 4), (3, 5)], "sample first: span [3, 5) overlaps the span [1, 4)"),
        ([(7, 9), (7, 9)], "sample second: span [7, 9) overlaps the span [7, 9)"),
        (
            [(7, 9), (1, 3)],
            "sample first: span [1, 3) is not sorted: it follows the span [7, 9)",
        ),
    ],
)
def test_wrong_spans_are_refused_with_sample_and_values(spans, message):
    with pytest.raises(DataError) as error:
        MixedMask.build([0, 6, 10], spans, sample_ids=["first", "second"])
    assert message in str(error.value)


def test_a_sample_without_a_name_is_numbered():
    with pytest.raises(DataError, match=r"sample #1 of the pack: span \[5, 9\)"):
        MixedMask.build([0, 4, 8], [(5, 9)])


def calls_visible(plan, num_rows, length):
    """Visible pairs of the two causal calls of a plan; no pair is in both."""
    counts = torch.zeros(num_rows, length, dtype=torch.int64)
    for call in (plan.causal, plan.flipped):
        if call is None:
            continue
        queries = torch.arange(num_rows) if call.queries is None else call.queries
        keys = torch.arange(length) if call.keys is None else call.keys
        pieces = zip(
            pairwise(call.cu_queries.tolist()), pairwise(call.cu_keys.tolist()), strict=True
        )
        longest = [0, 0]
        for (q0, q1), (k0, k1) in pieces:
            assert q0 < q1 and k0 < k1, "flash kernels are not called on empty pieces"
            longest = [max(longest[0], q1 - q0), max(longest[1], k1 - k0)]
            for q in range(q0, q1):  # bottom right: the last query sees the last key
                counts[queries[q], keys[k0 : k1 - (q1 - 1 - q)]] += 1
        assert longest == [call.max_queries, call.max_keys]
        assert (q1, k1) == (call.num_queries, call.num_keys)
        for index, count in ((call.queries, call.num_queries), (call.keys, call.num_keys)):
            assert index is None or index.shape == (count,)
    assert counts.max() <= 1
    return counts.bool()


@given(rows)
@settings(max_examples=150, deadline=None)
def test_the_flip_plan_holds_each_visible_pair_once(row):
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    visible = mask.visible()
    visible[cu[-1] :] = False  # padding is in no call
    assert torch.equal(calls_visible(mask.flip, length, length), visible)


@given(rows, st.data())
@settings(max_examples=150, deadline=None)
def test_the_flip_plan_of_chunks_holds_their_rows(row, data):
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    cuts = sorted(data.draw(st.sets(st.integers(0, length), min_size=2, max_size=4)))
    chunks = list(pairwise(cuts))[::2]
    held = torch.cat([torch.arange(*chunk) for chunk in chunks])
    visible = mask.visible()
    visible[cu[-1] :] = False
    assert torch.equal(calls_visible(mask.flip_of(chunks), len(held), length), visible[held])
    assert mask.flip_of(chunks) is mask.flip_of(chunks)  # made once


def test_a_mask_without_spans_is_one_causal_call():
    mask = MixedMask.build([0, 3, 7], [(1, 2), (3, 4)], length=8)  # spans of one token
    assert mask.flip.flipped is None
    assert mask.flip.causal is not None and mask.flip.causal.keys is None


def test_moving_keeps_everything():
    mask = MixedMask.build([0, 3, 7], [(1, 3)], length=8)
    moved = mask.to("cpu")
    assert torch.equal(moved.visible(), mask.visible())
    assert (moved.length, moved.max_seqlen, moved.num_samples) == (8, 4, 2)
