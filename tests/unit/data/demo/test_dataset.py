"""The demo data: equal bytes every time, texts that agree with the scenes, usable by training."""

import io
import json
import random

import pytest
from PIL import Image

from megatron_croc.data.demo import text as demo_text
from megatron_croc.data.demo.dataset import (
    VOCAB_SIZE,
    train_tokenizer,
    write_annotations,
    write_images,
)
from megatron_croc.data.demo.scenes import COLOURS, render_scene, sample_scene
from megatron_croc.data.sample.conversation import check_conversation
from megatron_croc.data.sample.tokenization import (
    build_tokenizer,
    check_tokenizer,
    tokenize_conversation,
)
from megatron_croc.errors import DataError

NUM_IMAGES = 60


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    list(write_images(folder / "images", NUM_IMAGES, seed=1, num_workers=1))
    write_annotations(folder, NUM_IMAGES, seed=1)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed=1))
    return folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_equal_bytes_with_any_number_of_workers(demo, tmp_path):
    list(write_images(tmp_path / "images", NUM_IMAGES, seed=1, num_workers=2))
    write_annotations(tmp_path, NUM_IMAGES, seed=1)
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(seed=1))
    assert contents(tmp_path) == contents(demo)
    assert render_scene(sample_scene(2, 0)) != render_scene(sample_scene(1, 0))


def test_every_record_is_trainable(demo):
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(demo / "tokenizer.model"))
    for template in ("plain", "v1"):
        check_tokenizer(tokenizer, template, vocab_size=VOCAB_SIZE)
    files = sorted(demo.glob("*.json"))
    assert len(files) == 6
    for path in files:
        for record in json.loads(path.read_text()):
            images = record.get("image", [])
            images = [images] if isinstance(images, str) else images
            assert all((demo / "images" / name).exists() for name in images)
            messages = record["conversations"]
            check_conversation(messages, num_images=len(images), sample_id=record["id"])
            sample = tokenize_conversation(
                tokenizer, "v1", messages, num_images=len(images), sample_id=record["id"]
            )
            assert len(sample.input_ids) + 64 * len(images) <= 512  # fits the tiny recipe


def test_validation_images_are_held_out(demo):
    def images(name):
        records = json.loads((demo / name).read_text())
        return {str(record.get("image")) for record in records} - {"None"}

    train = " ".join(images("finetune.json") | images("pretrain_croc.json"))
    held_out = images("valid_pretrain_croc.json") | images("valid_pretrain_mlp.json")
    assert held_out
    assert not any(name in train for name in held_out)


def test_finetune_mixes_kinds(tmp_path):
    write_annotations(tmp_path, 2000, seed=1)
    records = json.loads((tmp_path / "finetune.json").read_text())
    text_only = sum("image" not in record for record in records) / len(records)
    two_images = sum(isinstance(record.get("image"), list) for record in records) / len(records)
    assert 0.05 < text_only < 0.11
    assert 0.05 < two_images < 0.11


@pytest.mark.parametrize("index", range(20))
def test_images_show_what_the_captions_say(index):
    """The right colour lies at the right place: texts cannot drift from the drawing."""
    scene = sample_scene(1, index)
    image = Image.open(io.BytesIO(render_scene(scene))).convert("RGB")
    assert image.size == scene.size
    caption = demo_text.detailed_caption(scene, random.Random(0))[1]["value"]
    for item in scene.objects:
        assert f"A {item.size} {item.name} is " in caption
        cell = [(item.column, image.width), (item.row, image.height)]
        center = tuple(int((place + 0.5) * side / 3) for place, side in cell)
        window = image.crop((center[0] - 12, center[1] - 12, center[0] + 12, center[1] + 12))
        near = sum(
            count
            for count, pixel in window.getcolors(maxcolors=24 * 24)
            if sum(abs(a - b) for a, b in zip(pixel, COLOURS[item.colour], strict=True)) < 60
        )
        assert near > 60


def test_answers_follow_from_the_scene():
    for index in range(200):
        scene, rng = sample_scene(3, index), random.Random(index)
        messages = demo_text.questions(scene, rng)
        names = {item.name: item for item in scene.objects}
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            text = question["value"].replace("<image>", "").strip()
            if text.startswith("Is there a "):
                name = text.removeprefix("Is there a ").rstrip("?")
                assert answer["value"] == ("yes" if name in names else "no")
            elif text.startswith("Where is the "):
                item = names[text.removeprefix("Where is the ").rstrip("?")]
                assert answer["value"].endswith(item.position)
            elif text.startswith("What colour is the object "):
                (colour,) = [
                    item.colour
                    for item in scene.objects
                    if text.rstrip("?").endswith(f" the {item.position}")
                ]
                assert answer["value"] == colour


def test_every_question_says_what_kind_it_is():
    scene = sample_scene(1, 0)
    messages = demo_text.questions(scene, random.Random(0))
    messages += demo_text.comparison(scene, scene, random.Random(0))
    messages += demo_text.text_only(random.Random(0))
    assert all(message["type"] for message in messages[::2])
    assert not any("type" in message for message in messages[1::2])


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="num_images = 3"):
        list(write_images(tmp_path, 3, seed=1, num_workers=1))
