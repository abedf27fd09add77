"""The lengths in the index are those of training, and another tokenizer's are refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.build.lengths import SampleLengths, index_lengths
from megatron_croc.data.sample.tokenization import build_tokenizer, tokenize_conversation
from megatron_croc.data.store.manifest import read_manifest, verify_shards
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError

SPM = "SentencePieceTokenizer"


def measure(folder, tokenizer_model, template="v1"):
    done = index_lengths(
        Path(folder), tokenizer_type=SPM, tokenizer_model=tokenizer_model, template=template
    )
    return sum(done)


def test_text_tokens_and_images_of_every_sample(make_dataset, tokenizer_model):
    broken = {3: ([{"from": "human", "value": "?"}], [])}
    folders = [make_dataset(12, name="a", records=broken), make_dataset(7, name="b")]
    assert [measure(folder, tokenizer_model) for folder in folders] == [12, 7]
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


def test_several_tokenizers_and_templates_live_side_by_side(
    make_dataset, tokenizer_model, tmp_path
):
    folder = make_dataset(6)
    measure(folder, tokenizer_model, "v1")
    measure(folder, tokenizer_model, "plain")
    measure(folder, tokenizer_model, "v1")  # again: replaces its own
    assert [i.conversation_template for i in read_manifest(folder).lengths] == ["plain", "v1"]
    other = tmp_path / "other" / "tokenizer.model"
    other.parent.mkdir()
    other.write_bytes(Path(tokenizer_model).read_bytes())
    SampleLengths([folder], build_tokenizer(SPM, str(other)), "v1")  # the content counts
    with pytest.raises(DataError, match=r"has no sample lengths .*it has tokenizer.model with pl"):
        SampleLengths([folder], build_tokenizer(SPM, str(other), legacy=False), "v1")
    with pytest.raises(DataError, match=r"data lengths .*set --tokenizer-model .* qwen_1_5"):
        SampleLengths([folder], build_tokenizer(SPM, str(other)), "qwen_1_5")
    with pytest.raises(DataError, match="none at all"):
        SampleLengths([make_dataset(2, name="new")], build_tokenizer(SPM, str(other)), "v1")


def test_damaged_tables_are_refused(make_dataset, tokenizer_model):
    folder = make_dataset(6)
    measure(folder, tokenizer_model)
    tokenizer = build_tokenizer(SPM, tokenizer_model)
    verify_shards(folder)
    (table,) = Path(folder).glob("lengths-*.npy")
    whole = np.load(table)
    np.save(table, whole[1:])
    with pytest.raises(DataError, match="not one row for each of the 6 samples"):
        SampleLengths([folder], tokenizer, "v1")
    with pytest.raises(DataError, match=r"lengths-.* is not the file that was written"):
        verify_shards(folder)
    table.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        SampleLengths([folder], tokenizer, "v1")


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
    command += ["--input", str(tmp_path / "in.json"), "--image-folder", str(tmp_path)]
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
