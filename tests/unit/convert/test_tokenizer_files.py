"""The exported tokenizer knows `<image>`, pads on the left and keeps every other id."""

import json

import pytest

from megatron_croc.config.data import DataConfig
from megatron_croc.convert.tokenizer_files import check_same_tokenizer, write_tokenizer
from megatron_croc.data.demo.dataset import train_tokenizer
from megatron_croc.errors import CheckpointError
from tests.unit.convert.test_chat_templates import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "any name.model"
    path.write_bytes(train_tokenizer(seed=1))
    return path


def test_sentencepiece_as_a_llama_tokenizer(model, tmp_path):
    import sentencepiece
    from transformers import AutoTokenizer

    image = write_tokenizer(model, tmp_path, template="v1")
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.Load(str(model))
    assert image.id == pieces.GetPieceSize()
    assert image.specials["eos"] == pieces.eos_id()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<image>") == image.id
    assert tokenizer.padding_side == "left"
    text = "Is there a red circle?"
    assert tokenizer.encode(text, add_special_tokens=False) == pieces.EncodeAsIds(text)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith(f"USER: <image>\n{text} ASSISTANT:")


def test_a_directory_is_copied_and_exported_again_unchanged(model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for source, folder in ((model, first), (first, second)):
        folder.mkdir()
        image = write_tokenizer(source, folder, template="qwen_1_5")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in second.iterdir()
    }
    config = json.loads((first / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"][str(image.id)]["content"] == "<image>"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(model_type="unigram"), "not of type BPE"),
        (dict(user_defined_symbols=["<tool>"]), "user-defined pieces"),
        (dict(treat_whitespace_as_suffix=True), "end with spaces"),
    ],
)
def test_what_a_tokenizer_json_cannot_express(settings, words, tmp_path):
    (tmp_path / "a.model").write_bytes(train(**{"model_type": "bpe", **settings}))
    with pytest.raises(CheckpointError, match=words):
        write_tokenizer(tmp_path / "a.model", tmp_path, template="v1")


def test_damaged_models_are_refused(model, tmp_path):
    from megatron_croc.convert.sentencepiece_json import read_model

    for number, content in enumerate((b"", b"\x00", model.read_bytes()[:-3], b"\xff" * 40)):
        path = tmp_path / f"{number}.model"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
            read_model(path)


def test_the_written_ids_are_compared(model, tmp_path, monkeypatch):
    from megatron_croc.convert import tokenizer_files

    def without_prefix(*arguments, **options):
        content = sentencepiece_json(*arguments, **options)
        return content | {"normalizer": None}

    sentencepiece_json = tokenizer_files.sentencepiece_json
    monkeypatch.setattr(tokenizer_files, "sentencepiece_json", without_prefix)
    with pytest.raises(CheckpointError, match=r"other ids in a tokenizer\.json"):
        write_tokenizer(model, tmp_path, template="v1")


def test_another_tokenizer_than_the_runs(model, tmp_path):
    data = DataConfig(tokenizer_model=str(model))
    check_same_tokenizer(model, data, 512)
    other = tmp_path / "tokenizer.model"
    other.write_bytes(train(model_type="bpe"))
    for changed, config in ((other, {}), (tmp_path / "l" / "tokenizer.model", {"legacy": False})):
        changed.parent.mkdir(exist_ok=True)
        if config:  # the same pieces, with a prefix in other places
            changed.write_bytes(model.read_bytes())
            (changed.parent / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"export with --tokenizer {model}"):
            check_same_tokenizer(changed, data, 512)
    with pytest.raises(CheckpointError, match=r"is not the run.s: .*vocab_size is 100"):
        check_same_tokenizer(model, DataConfig(), 100)


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        write_tokenizer(tmp_path, tmp_path, template="v1")
    with pytest.raises(CheckpointError, match="no such file"):
        write_tokenizer(tmp_path / "x", tmp_path, template="v1")
