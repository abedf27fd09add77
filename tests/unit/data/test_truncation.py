"""Labels that seq_length cuts off are counted by sample and source; nothing left: a bad sample."""

import numpy as np
import pytest

from megatron_croc.data import truncation
from megatron_croc.data.batch_builder import BatchBuilder
from megatron_croc.data.order.row_plan import Slot
from megatron_croc.data.sample.collate import check_answer, measure_extent
from megatron_croc.data.sample.tokenization import build_tokenizer, tokenize_conversation
from megatron_croc.data.truncation import Extent, TruncationCount
from tests.unit.data.small_samples import conversation, jpeg


def extent(length: int, answer: int) -> Extent:
    return Extent(length=length, images_end=0, labels=np.arange(answer, length), answer=answer)


def long_question(words: int) -> tuple:
    messages = conversation(0, 1)
    messages[0]["value"] += " what" * words
    return messages, [("jpg", jpeg(0))]


@pytest.fixture
def builder(make_dataset, make_run):
    """Sample 1 loses its answer, sample 3 the end of it, sample 5 its image."""
    long_answer = conversation(3, 0)
    long_answer[1]["value"] = "a thing" * 200
    late_image = [{"from": "human", "value": "<image>" + "thing " * 600 + "<image>"}]
    late_image.append(conversation(0, 0)[1])
    records = {1: long_question(600), 3: (long_answer, []), 5: (late_image, [("jpg", jpeg(0))] * 2)}
    run = make_run(make_dataset(8, records=records))
    return BatchBuilder(
        data=run.data,
        model=run.model,
        reconstructs=False,
        folders=run.data.data_path,
        seed=1,
        pad_to_multiple_of=1,
    ), run


def test_a_sample_without_an_answer_is_bad(builder):
    builder, run = builder
    batch, bad = builder.build([Slot(epoch=0, index=i) for i in range(8)])
    assert [(error.sample_id[-6:], error.kind) for error in bad] == [
        ("000001", "no_label"),
        ("000000", "too_long"),  # the sixth sample, first of the second shard
    ]
    assert "raise --seq-length to" in bad[0].reason and "answers are cut off" in bad[0].reason
    assert [cut.sample_id[-6:] for cut in batch.cuts] == ["000001", "000003", "000000"]
    assert all(cut.length > run.data.seq_length and cut.num_labels_lost for cut in batch.cuts)
    again, _ = builder.build([Slot(epoch=1, index=3)])  # a function of the sample alone
    assert again.cuts == batch.cuts[1:2]
    # The length named is the smallest that helps.
    needed = int(bad[0].reason.split("--seq-length to ")[1].split()[0])
    for seq_length, number_bad in ((needed, 0), (needed - 1, 1)):
        builder._data.seq_length = seq_length
        assert len(builder.build([Slot(epoch=0, index=1)])[1]) == number_bad


def test_tokens_around_a_turn_are_no_answer(tmp_path):
    """ChatML supervises the marks of every turn: a cut answer leaves labels that teach nothing."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    sample = tokenize_conversation(
        tokenizer, "qwen_1_5", conversation(0, 1), num_images=1, sample_id="s"
    )
    found = measure_extent(sample, num_visual_tokens=16)
    ids = np.repeat(sample.input_ids, np.where(sample.input_ids < 0, 16, 1))
    assert tokenizer.decode(ids[found.answer :]).startswith("a thing 0")
    assert not found.teaches(found.answer) and found.teaches(found.answer + 1)
    assert len(found.labels) - found.labels_lost(found.answer + 1) > 1


def test_counts_of_a_source():
    count, other = TruncationCount(100), TruncationCount(100)
    for length in range(2, 202):
        (count if length % 2 else other).add(extent(length, length // 2))
    count.add(extent(300, 100))
    count.add(Extent(length=180, images_end=150, labels=np.arange(150, 180), answer=150))
    count.merge(other)
    assert (count.num_samples, count.num_cut) == (202, 103)
    assert (count.num_without_answer, count.num_images_split) == (3, 1)
    assert count.quantile(0.99) == 200 and count.proposed_seq_length == 256
    text = count.describe()
    assert "103 of 202 samples are longer than seq_length = 100" in text
    assert "--seq-length 256 would keep 99%" in text
    whole = TruncationCount(100)
    whole.add(extent(50, 20))
    assert whole.share_lost == 0 and "--seq-length" not in whole.describe()


def test_nothing_to_learn_is_named():
    empty = Extent(length=9, images_end=0, labels=np.array([], dtype=np.int64), answer=0)
    with pytest.raises(Exception, match="no token of it has a label"):
        check_answer("s", empty, seq_length=100)


def test_log_of_a_source(monkeypatch):
    told = []
    monkeypatch.setattr(truncation.logger, "warning", lambda text, *a: told.append(text % a))
    log = truncation.TruncationLog(100)
    for _ in range(400):
        log.add("whole", extent(50, 20))
        log.add("cut", extent(150, 80))
    assert [line.split(" samples")[0] for line in told] == [
        "source cut: 32 of 32",
        "source cut: 320 of 320",
    ]
