"""Settings an export must contain, as loaders otherwise compute something else silently."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.synthetic import tiny_run
from tests.unit.convert.families import VOCABULARY, read_all, save_family


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, export with a tokenizer) of a family."""
    from megatron_croc.convert.exporting import export_huggingface
    from megatron_croc.convert.importing import import_huggingface

    made: dict[str, tuple[Path, Path]] = {}

    def export(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            llm, vision = save_family(folder, name)
            import_huggingface(llm, folder / "start", vision_folder=vision)
            write_words(folder / "words")
            export_huggingface(folder / "start", folder / "hf", tokenizer=folder / "words")
            made[name] = folder / "start", folder / "hf"
        return made[name]

    return export


def write_words(folder: Path) -> None:
    """A tokenizer of just as many words as the model has rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words = [*specials, "<unk>", "\n", *(f"w{number}" for number in range(VOCABULARY - 6))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.add_special_tokens(specials)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", ["vicuna + clip", "qwen2 + siglip"])
def test_no_loader_takes_it_for_stock_llava(family, exported):
    """Stock LLaVA lacks the norm: made to load the weights, it gives another answer."""
    import transformers

    from megatron_croc.convert.export_loader import load_export

    _, export = exported(family)
    config = config_of(export)
    assert config["model_type"] == "croc"
    assert config["architectures"] == ["CrocForConditionalGeneration"]
    loaders = {"AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"}
    assert loaders | {"AutoConfig"} == config["auto_map"].keys()
    for stock_class in (transformers.LlavaForConditionalGeneration, transformers.LlavaModel):
        with pytest.raises(KeyError, match="gelu_unit_length"):
            stock_class.from_pretrained(export)

    ours = load_export(export, torch.float32)
    as_llava = {"model_type": "llava", "projector_hidden_act": "gelu"}
    stock = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**{**ours.config.to_dict(), **as_llava})
    ).eval()
    stock.load_state_dict(ours.state_dict())
    ids = torch.tensor([[3, *[ours.config.image_token_id] * 16, 4]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56)}
    with torch.no_grad():
        assert (ours(**inputs).logits - stock(**inputs).logits).abs().max() > 0.01


def test_a_tokenizer_that_is_not_the_runs_is_refused_before_writing(exported, tmp_path):
    from megatron_croc.convert.exporting import export_huggingface
    from megatron_croc.data.demo.dataset import train_tokenizer
    from megatron_croc.errors import CheckpointError

    checkpoint, _ = exported("vicuna + clip")
    (tmp_path / "other.model").write_bytes(train_tokenizer(seed=1))
    with pytest.raises(CheckpointError, match="is not the run's"):
        export_huggingface(checkpoint, tmp_path / "hf", tokenizer=tmp_path / "other.model")
    assert not (tmp_path / "hf").exists()


def test_rope_is_written_as_every_version_reads_it(exported):
    for family, theta in (("qwen2 + siglip", 1e6), ("llama3 rope + clip", 5e5)):
        text = config_of(exported(family)[1])["text_config"]
        assert text["rope_theta"] == theta and "rope_parameters" not in text
    assert text["rope_scaling"]["rope_type"] == "llama3"


def test_rows_of_new_tokens_are_the_mean_and_are_never_said(exported):
    _, export = exported("vicuna + clip")
    image = config_of(export)["image_token_index"]
    assert image == VOCABULARY  # no row of the model's own
    tensors = read_all(export)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        table = tensors[name]
        assert len(table) > image
        mean = table[:VOCABULARY].mean(dim=0)
        torch.testing.assert_close(table[VOCABULARY:], mean.expand(len(table) - VOCABULARY, -1))
    generation = json.loads((export / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(VOCABULARY, len(table)))
    assert json.loads((export / "tokenizer_config.json").read_text())["padding_side"] == "left"


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (56, 56)])
@pytest.mark.parametrize("family", ["vicuna + clip", "qwen2 + siglip"])
def test_the_exported_processor_makes_the_pixels_of_training(family, size, exported):
    from transformers import AutoImageProcessor

    from megatron_croc.convert.configs import read_conversation, read_export
    from megatron_croc.data.sample.image_transform import ImageTransform

    _, export = exported(family)
    picture = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    check_pixels(
        picture,
        ImageTransform.build(
            read_export(export).vision_tower, read_conversation(export).image_aspect_ratio
        ),
        AutoImageProcessor.from_pretrained(export, backend="pil"),
        read_export(export).vision_tower,
    )


@pytest.mark.parametrize("size", [(90, 60), (60, 90)])
def test_a_run_that_crops_exports_a_processor_that_crops(size, tmp_path):
    from transformers import AutoImageProcessor

    from megatron_croc.config.run import RunConfig
    from megatron_croc.convert.export_config import processor_configs
    from megatron_croc.data.sample.image_transform import ImageTransform

    run = RunConfig()
    run.data.image_aspect_ratio = "square"
    run.model.vision_tower.img_size = 56
    for file, content in processor_configs(run.model.vision_tower, run.data).items():
        (tmp_path / file).write_text(json.dumps(content))
    picture = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    check_pixels(
        picture,
        ImageTransform.build(run.model.vision_tower, "square"),
        AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
        run.model.vision_tower,
    )


def check_pixels(picture, transform, processor, vision) -> None:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    ours = transform.decode_with_pil(stream.getvalue()).float() / 255.0
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vision.image_mean, vision.image_std))
    theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    # One level of 256 is what two roundings of a resize may differ by.
    assert float(((ours - mean) / std - theirs).abs().max()) <= 1.01 / 255 / float(std.min())


@pytest.mark.parametrize("vocab_size", [127, 128, 192])
def test_the_image_mark_has_a_row_whatever_the_vocabulary(vocab_size, tmp_path, monkeypatch):
    """32,000 words, as Vicuna's, fill a multiple of 64: the mark needs rows of its own."""
    from megatron_croc.convert.exporting import export_huggingface
    from megatron_croc.convert.importing import import_huggingface
    from tests.unit.convert import families

    monkeypatch.setattr(families, "VOCABULARY", vocab_size)
    llm, vision = save_family(tmp_path, "vicuna + clip")
    import_huggingface(llm, tmp_path / "start", vision_folder=vision)
    export_huggingface(tmp_path / "start", tmp_path / "hf")
    config = config_of(tmp_path / "hf")
    rows = config["text_config"]["vocab_size"]
    assert config["image_token_index"] >= vocab_size  # no word's row
    assert rows % 64 == 0 and config["image_token_index"] < rows <= vocab_size + 64
    tables = {n: t for n, t in read_all(tmp_path / "hf").items() if len(t) == rows}
    assert {name.rsplit(".", 2)[-2] for name in tables} == {"embed_tokens", "lm_head"}


def test_the_rows_of_a_vocabulary_of_32000():
    from megatron_croc.convert.export_config import table_rows

    model = tiny_run(vocab_size=32_000).model
    assert table_rows(model, 32_000) == 32_064
    assert table_rows(model, 32_063) == 32_064
    assert table_rows(model, 32_064) == 32_128
    assert table_rows(model, 31_999) == 32_000  # a word of the tokenizer is the mark
