"""Tokenizers from texts: LLaMA's ids, any number of texts, and one clear line otherwise."""

import json
from pathlib import Path

import pytest

from megatron_croc.cli.main import main
from megatron_croc.data.records.reading import texts_of
from megatron_croc.data.sample.tokenization import Tokenizer, build_tokenizer, check_tokenizer
from megatron_croc.data.sample.tokenizer_training import MAX_LINE, train_sentencepiece
from megatron_croc.errors import DataError

RECORDS = [
    {"image": "a.jpg", "caption": "A red boat on a quiet lake."},
    {"image": "b.jpg", "caption": "Two sheep under an old tree."},
    {
        "image": "c.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nHow many horses?"},
            {"from": "gpt", "value": "Three horses."},
        ],
    },
]


def load(path: Path) -> Tokenizer:
    return build_tokenizer("SentencePieceTokenizer", str(path))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_few_records_give_a_tokenizer_for_the_tiny_recipes(tmp_path, capsys, suffix):
    source, output = tmp_path / f"texts.{suffix}", tmp_path / "new" / "tokenizer.model"
    lines = [json.dumps(record) for record in RECORDS]
    source.write_text(f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines))
    words = ["data", "tokenizer", "--input", str(source), "--output", str(output)]
    assert main(words) == 0
    tokenizer = load(output)
    assert f"{output}: {tokenizer.size} ids" in capsys.readouterr().out
    for template in ("plain", "v1"):
        check_tokenizer(tokenizer, template, vocab_size=512)
    assert tokenizer.special_ids == {"<s>": 1, "</s>": 2, "bos": 1, "eos": 2}
    for text in ("A red boat.", "Two sheep", "\u00e4 7 \u6c34"):  # the last one in bytes
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("horses")) < len("horses")  # not letter by letter
    assert len(tokenizer.encode("assistant")) < 4  # the prompt is among the texts
    first = output.read_bytes()
    output.unlink()
    assert main(words) == 0 and output.read_bytes() == first


def test_a_tokenizer_in_use_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    output = tmp_path / "tokenizer.model"
    output.write_text("mine")
    assert (
        main(["data", "tokenizer", "--input", f"{tmp_path}/a.json", "--output", str(output)]) == 1
    )
    assert "exists already" in capsys.readouterr().err and output.read_text() == "mine"


def test_no_more_records_are_read_than_asked(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"caption": f"{name} {name * 9}"}] * 4))
    inputs = [str(tmp_path / f"{name}.json") for name in ("a", "b")]
    sizes = {}
    for count in (4, 5):
        output = tmp_path / f"{count}.model"
        words = ["--input", *inputs, "--max-records", str(count), "--output", str(output)]
        assert main(["data", "tokenizer", *words]) == 0
        sizes[count] = len(load(output).encode("bbbbbbbbb"))
    assert sizes[5] < sizes[4]


def test_too_few_ids_are_refused_with_the_number_needed(tmp_path, capsys):
    texts = ["".join(chr(0x4E00 + i) for i in range(300)) + " 12"]
    with pytest.raises(DataError) as error:
        train_sentencepiece(texts, 512)
    needed = int(str(error.value).rsplit(" ", 1)[1])
    assert needed == 3 + 256 + 303
    train_sentencepiece(texts, needed)
    with pytest.raises(DataError, match="need at least"):
        train_sentencepiece(texts, needed - 1)
    (tmp_path / "a.json").write_text("[]")
    words = ["data", "tokenizer", "--input", f"{tmp_path}/a.json", "--output", f"{tmp_path}/t"]
    assert main(words) == 1
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/a.json: no text to train a tokenizer from\n"
    )


def test_a_long_text_counts_too(tmp_path):
    long = "zebra " * MAX_LINE  # above what SentencePiece takes at once
    (tmp_path / "t.model").write_bytes(train_sentencepiece([long], 300))
    assert len(load(tmp_path / "t.model").encode("zebra")) == 1


@pytest.mark.parametrize(
    "record", [None, 3, {}, {"conversations": 3}, {"conversations": [3, {"value": 4}]}]
)
def test_a_record_without_text_gives_none(record):
    assert texts_of(record) == []


def test_texts_of_a_record_have_no_image_marks():
    assert texts_of(RECORDS[2]) == ["How many horses?", "Three horses."]
    chat = [
        {"role": "user", "content": "Hello <image>"},
        {"role": "assistant", "content": "<image>"},
    ]
    assert texts_of({"messages": chat}) == ["Hello"]
