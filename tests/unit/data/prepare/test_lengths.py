"""Lengths are measured as training counts tokens; a bad sample counts as its placeholder."""

import json
import subprocess
import sys

import numpy as np

from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.tokenization import build_tokenizer, tokenize_conversation
from megatron_croc.data.store.sample_lengths import SampleLengths
from megatron_croc.data.store.shards import ShardedDataset
from tests.unit.data.small_samples import measure_lengths

SPM = "SentencePieceTokenizer"


def test_text_tokens_and_images_of_every_sample(make_dataset, tokenizer_model):
    broken = {3: ([{"from": "human", "value": "?"}], [])}
    folders = [make_dataset(12, name="a", records=broken), make_dataset(7, name="b")]
    assert [measure_lengths(folder, tokenizer_model) for folder in folders] == [12, 7]
    tokenizer = build_tokenizer(SPM, tokenizer_model)
    lengths = SampleLengths(folders, tokenizer, "v1")
    order = np.random.default_rng(0).permutation(19)
    text, images = lengths(order)
    dataset = ShardedDataset(folders)
    for place, index in enumerate(order):
        if index == 3:
            assert (text[place], images[place]) == (1, 0)
            continue
        raw = dataset.read(int(index))
        ids = tokenize_conversation(
            tokenizer, "v1", raw.conversations, num_images=len(raw.image_bytes), sample_id=""
        ).input_ids
        assert text[place] == (ids != IMAGE_TOKEN_INDEX).sum()
        assert images[place] == len(raw.image_bytes)


def test_the_commands_measure(make_dataset, tokenizer_model, tmp_path):
    folder = make_dataset(6)
    command = [sys.executable, "-m", "megatron_croc", "data", "lengths", folder]
    subprocess.run([*command, "--tokenizer-model", tokenizer_model], check=True)
    answers = ["a", "a cat", "two cats and a dog"]
    records = [
        {"conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": answer}]}
        for answer in answers
    ]
    (tmp_path / "in.json").write_text(json.dumps(records))
    command = [sys.executable, "-m", "megatron_croc", "data", "preprocess"]
    command += ["--input", str(tmp_path / "in.json")]
    command += ["--output", str(tmp_path / "out"), "--tokenizer-model", tokenizer_model]
    subprocess.run([*command, "--conversation-template", "plain"], check=True)
    tokenizer = build_tokenizer(SPM, tokenizer_model)
    for made, template, number in ((folder, "v1", 6), (tmp_path / "out", "plain", 3)):
        text, images = SampleLengths([str(made)], tokenizer, template)(np.arange(number))
        dataset = ShardedDataset([str(made)])
        for index in range(number):
            raw = dataset.read(index)
            ids = tokenize_conversation(
                tokenizer,
                template,
                raw.conversations,
                num_images=len(raw.image_bytes),
                sample_id="",
            ).input_ids
            assert text[index] == (ids != IMAGE_TOKEN_INDEX).sum()
            assert images[index] == len(raw.image_bytes)
    assert len(set(text)) == 3  # the answers are of different lengths
