"""The exported tokenizer knows `<image>`, pads on the left and keeps every other id."""

import json

import pytest

from megatron_croc.convert.tokenizer_files import write_tokenizer
from megatron_croc.data.demo.dataset import train_tokenizer
from megatron_croc.errors import CheckpointError


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


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        write_tokenizer(tmp_path, tmp_path, template="v1")
    with pytest.raises(CheckpointError, match="no such file"):
        write_tokenizer(tmp_path / "x", tmp_path, template="v1")
