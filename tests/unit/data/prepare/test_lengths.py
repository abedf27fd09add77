"""Lengths are measured as training counts tokens; a bad sample counts as its placeholder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.prepare import lengths as lengths_module
from megatron_croc.data.sample.tokenization import build_tokenizer, tokenize_conversation
from megatron_croc.data.store.sample_lengths import SampleLengths
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.data.truncation import TruncationCount
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


def test_cuts_are_counted_while_measuring(make_dataset, tokenizer_model, monkeypatch):
    """The same numbers from any cut of the samples into chunks."""
    folder = make_dataset(12, records={3: ([{"from": "human", "value": "?"}], [])})
    found = []
    for chunk in (100, 5):
        monkeypatch.setattr(lengths_module, "CHUNK", chunk)
        counts = [TruncationCount(n) for n in (20, 150, 4096)]
        list(
            lengths_module.index_lengths(
                Path(folder),
                tokenizer_type=SPM,
                tokenizer_model=tokenizer_model,
                template="v1",
                num_visual_tokens=64,
                truncation=counts,
            )
        )
        found.append([count.as_tree() for count in counts])
    assert found[0] == found[1]
    short, middle, whole = found[0]
    assert short["num_samples"] == 11  # the bad sample has no labels to count
    assert (short["num_cut"], short["share_of_labels_lost"]) == (11, 1.0)
    assert 0 < middle["num_cut"] < 11 and 0 < middle["share_of_labels_lost"] < 1
    assert (whole["num_cut"], whole["share_of_labels_lost"]) == (0, 0)
