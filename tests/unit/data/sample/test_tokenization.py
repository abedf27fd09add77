"""Token ids and labels equal the released code's, and unfit tokenizers are refused early."""

import json

import numpy as np
import pytest

from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.conversation import parts_as_text, render_conversation
from megatron_croc.data.sample.tokenization import (
    build_tokenizer,
    check_tokenizer,
    tokenize_conversation,
    tokenize_prompt,
)
from megatron_croc.errors import DataError


@pytest.fixture(scope="module")
def tokens_dir(golden_dir):
    return golden_dir / "tokens"


@pytest.fixture(scope="module")
def spm_path(tokens_dir):
    return str(tokens_dir / "tok.model")


@pytest.fixture(scope="module")
def byte_level_dir(tmp_path_factory):
    """The recorded qwen vocabulary: one id per byte, sorted by stand-in, and three specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    folder = tmp_path_factory.mktemp("byte_level")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=names[2], pad_token=names[0]
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("template", ["v1", "plain"])
@pytest.mark.parametrize("legacy", [True, False])
def test_released_llava_tokens(tokens_dir, spm_path, template, legacy):
    case = json.loads((tokens_dir / "tokens.json").read_text())["cases"][
        f"{template}_legacy{legacy}"
    ]
    tokenizer = build_tokenizer("SentencePieceTokenizer", spm_path, legacy=legacy)
    check_tokenizer(tokenizer, template, vocab_size=420)
    rows = zip(case["data"], case["input_ids"], case["labels"], case["attention_mask"], strict=True)
    for record, ids, labels, mask in rows:
        sample = tokenize_conversation(
            tokenizer,
            template,
            record["conversations"],
            num_images=int("image" in record),
            sample_id="golden",
        )
        length = sum(mask)
        assert sample.input_ids.tolist() == ids[:length]
        assert sample.labels.tolist() == labels[:length]


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_released_llava_strings(tokens_dir, template):
    case = json.loads((tokens_dir / "tokens.json").read_text())["cases"][f"{template}_legacyTrue"]
    for record in case["data"]:
        num_images = int("image" in record)
        if num_images == 0 and template == "v1":
            continue  # text-only strings were not recorded
        parts = render_conversation(
            template, record["conversations"], num_images=num_images, sample_id="golden"
        )
        assert parts_as_text(parts, bos="") in case["strings_tokenised"]


def test_released_qwen_tokens(tokens_dir, byte_level_dir):
    case = json.loads((tokens_dir / "qwen_labels.json").read_text())
    tokenizer = build_tokenizer("HuggingFaceTokenizer", byte_level_dir)
    check_tokenizer(tokenizer, "qwen_1_5", vocab_size=259)
    sample = tokenize_conversation(
        tokenizer, "qwen_1_5", case["source"][0], num_images=1, sample_id="golden"
    )
    assert sample.input_ids.tolist() == case["input_ids"]
    assert sample.labels.tolist() == case["labels"]


def test_every_answer_is_supervised_and_no_question(spm_path):
    tokenizer = build_tokenizer("SentencePieceTokenizer", spm_path)
    messages = [
        {"from": "human", "value": "<image>\nwhat is it ?\n<image>"},
        {"from": "gpt", "value": "a red car"},
        {"from": "human", "value": "tell me a joke"},
        {"from": "gpt", "value": "two dogs"},
    ]
    sample = tokenize_conversation(tokenizer, "v1", messages, num_images=2, sample_id="s")
    assert (sample.input_ids == IMAGE_TOKEN_INDEX).sum() == 2
    said = tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX])
    assert said == "a red car two dogs"
    assert (sample.labels == tokenizer.eos_id).sum() == 2


def test_special_tokens_in_messages_stay_text(spm_path, byte_level_dir):
    messages = [{"from": "human", "value": "is </s> or <|im_end|> a token ?"}]
    messages += [{"from": "gpt", "value": "no </s><|im_end|>"}]
    vicuna = build_tokenizer("SentencePieceTokenizer", spm_path)
    sample = tokenize_conversation(vicuna, "v1", messages, num_images=0, sample_id="s")
    assert (sample.input_ids == vicuna.special_ids["eos"]).sum() == 1
    qwen = build_tokenizer("HuggingFaceTokenizer", byte_level_dir)
    sample = tokenize_conversation(qwen, "qwen_1_5", messages, num_images=0, sample_id="s")
    assert (sample.input_ids == qwen.special_ids["<|im_end|>"]).sum() == 3


def test_prompt_is_the_beginning_of_the_conversation(spm_path):
    tokenizer = build_tokenizer("SentencePieceTokenizer", spm_path)
    prompt = tokenize_prompt(tokenizer, "v1", "what is it ?\n<image>")
    messages = [
        {"from": "human", "value": "what is it ?\n<image>"},
        {"from": "gpt", "value": "a car"},
    ]
    sample = tokenize_conversation(tokenizer, "v1", messages, num_images=1, sample_id="s")
    np.testing.assert_array_equal(sample.input_ids[: len(prompt)], prompt)
    assert (sample.labels[: len(prompt)] == IGNORE_INDEX).all()
    assert (sample.labels[len(prompt) :] != IGNORE_INDEX).all()


def test_legacy_flag_is_read_beside_the_model(tmp_path, spm_path):
    model = tmp_path / "tokenizer.model"
    with open(spm_path, "rb") as source:
        model.write_bytes(source.read())
    assert build_tokenizer("SentencePieceTokenizer", str(model)).legacy
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    assert not build_tokenizer("SentencePieceTokenizer", str(model)).legacy


def test_unfit_tokenizers_are_refused(tmp_path, spm_path, byte_level_dir):
    vicuna = build_tokenizer("SentencePieceTokenizer", spm_path)
    qwen = build_tokenizer("HuggingFaceTokenizer", byte_level_dir)
    with pytest.raises(DataError, match=r"420 ids.*vocab_size is 419"):
        check_tokenizer(vicuna, "v1", vocab_size=419)
    with pytest.raises(DataError, match=r"<\|im_start\|>, <\|im_end\|>"):
        check_tokenizer(vicuna, "qwen_1_5", vocab_size=420)
    with pytest.raises(DataError, match=r"lacks the special token\(s\) bos"):
        check_tokenizer(qwen, "v1", vocab_size=300)
    with pytest.raises(DataError, match="does not exist"):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path / "none.model"))
    with pytest.raises(DataError, match="is a folder"):
        build_tokenizer("SentencePieceTokenizer", byte_level_dir)
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk\.model is not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path / "junk.model"))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
