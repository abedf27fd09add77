"""The legacy flag follows the files of a folder, and other ids than transformers' are told."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_croc.data.sample import tokenizer_check
from megatron_croc.data.sample.legacy import decide_legacy
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.sample.tokenizer_check import announce_tokenizer, compare_with_transformers
from megatron_croc.data.sample.tokenizer_training import PROMPT, train_sentencepiece
from megatron_croc.errors import DataError

PREPEND = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}]}}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def metaspace(**settings) -> dict:
    return {"pre_tokenizer": {"type": "Metaspace", **settings}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, True),
        ({"tokenizer_config": {"legacy": False}, "tokenizer": PREPEND}, False),
        ({"tokenizer_config": {"legacy": True, "backend": "tokenizers"}}, True),
        ({"tokenizer_config": {"legacy": None}, "tokenizer": PREPEND}, True),
        ({"tokenizer": metaspace(prepend_scheme="first")}, False),
        ({"tokenizer": metaspace(prepend_scheme="always")}, True),
        ({"tokenizer": metaspace(add_prefix_space=True)}, True),
        ({"tokenizer": metaspace(prepend_scheme="never")}, True),
        ({"config": {"transformers_version": "4.37.2"}}, True),
        ({"config": {"transformers_version": "5.1.0"}}, False),
        ({"tokenizer_config": {"backend": "tokenizers"}}, False),
        # transformers 5 builds its Llama class from the vocabulary, others from the file.
        (
            {
                "tokenizer_config": {"backend": "tokenizers", "tokenizer_class": "LlamaTokenizer"},
                "tokenizer": metaspace(prepend_scheme="always"),
            },
            False,
        ),
        (
            {
                "tokenizer_config": {"backend": "tokenizers", "tokenizer_class": "Other"},
                "tokenizer": PREPEND,
            },
            True,
        ),
    ],
)
def test_the_folder_decides(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = decide_legacy(tmp_path)
    assert found.value is expected and str(tmp_path) in found.reason


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read: not valid JSON"):
        decide_legacy(tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    texts = [PROMPT, "What is it? A red car.", "USER: two dogs and a quick brown fox"]
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(texts * 20, 400))
    return tmp_path


def write_config(folder: Path, **settings) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", **NAMES, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_ids_are_compared_with_transformers(folder, monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = str(folder / "tokenizer.model")
    tokenizer = build_tokenizer("SentencePieceTokenizer", model)
    assert compare_with_transformers(tokenizer, "v1") is None  # no folder of transformers
    write_config(folder, legacy=False)
    tokenizer = build_tokenizer("SentencePieceTokenizer", model)
    assert compare_with_transformers(tokenizer, "v1") is None
    write_config(folder)  # no key: transformers 4 took True, transformers 5 takes False
    tokenizer = build_tokenizer("SentencePieceTokenizer", model)
    found = compare_with_transformers(tokenizer, "v1")
    assert found is not None and "\n" not in found
    assert "behind special tokens only: legacy=True here" in found
    assert '"legacy": false or true' in found
    # Saved again by transformers 5, the key is gone: its own reading is followed.
    write_config(folder, legacy=True)
    again = folder / "again"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    for kind, path in (("HuggingFaceTokenizer", again), ("SentencePieceTokenizer", None)):
        if path is None:
            path = shutil.copy(model, again / "tokenizer.model")
        tokenizer = build_tokenizer(kind, str(path))
        assert not tokenizer.legacy and "transformers 5 wrote" in tokenizer.legacy_reason
        assert compare_with_transformers(tokenizer, "v1") is None
    other = build_tokenizer("SentencePieceTokenizer", str(again / "tokenizer.model"), legacy=True)
    other._encode = lambda text: [7, *tokenizer._encode(text)]
    assert "in ordinary text" in (compare_with_transformers(other, "plain") or "")
    told = []
    monkeypatch.setattr(
        tokenizer_check, "log_once", lambda _, level, text, *a: told.append(text % a)
    )
    announce_tokenizer(other, "plain")
    assert "legacy=True (as asked)" in told[0] and "in ordinary text" in told[1]
