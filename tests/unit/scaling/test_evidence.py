import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.evidence import emoji
from benchmarks.evidence.probe import probe
from benchmarks.evidence.records import Asked, describe, main

QUESTIONS = {
    "train": [
        ["what color is the shape?", "blue", 0],
        ["is there a red shape?", "no", 0],
        ["is no circle present?", "no", 0],  # so there is one
        ["what color is the triangle?", "teal", 1],
        ["does the image not contain a green shape?", "yes", 2],  # tells nothing that is there
        ["what shape is present?", "circle", 2],
    ],
    "test": [[f"is there a {c} shape?", "yes", i] for i, c in enumerate(("red", "gray", "blue"))],
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for split, questions in QUESTIONS.items():
        folder = tmp_path / "package" / "easy_vqa" / "data" / split
        (folder / "images").mkdir(parents=True)
        (folder / "questions.json").write_text(json.dumps(questions))
    return tmp_path / "package"


def test_records_of_a_package(package, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):  # again over its own output
        main(["--out", str(out), "--package", str(package), "--held-out", "2"])
    assert f"{out / 'finetune.json'}: 6 records\n" in capsys.readouterr().out
    read = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert read["pretrain_mlp"] == [
        {"image": "train/0.png", "caption": "a blue circle."},
        {"image": "train/1.png", "caption": "a teal triangle."},  # picture 2: no colour is told
    ]
    assert [row["image"] for row in read["pretrain_croc"]] == ["train/0.png", "train/1.png"]
    question, answer = read["finetune"][2]["conversations"]
    assert question["value"] == "<image>\nis no circle present?" and answer["value"] == "no"
    assert [r["id"] for r in read["valid_finetune"]] == ["test-0", "test-1"]
    assert read["valid_pretrain_croc"] == []
    assert (out / "images" / "train").is_dir()


@pytest.mark.parametrize(
    ("text", "answer", "kind"),
    [
        ("what color is the circle?", "red", "colour"),
        ("what is the red shape?", "circle", "shape"),
        ("is there a red shape?", "no", "yes or no, colour"),
        ("is there a circle?", "no", "yes or no, shape"),
        ("is no circle present?", "no", "negated: yes or no, shape"),
        ("does the image not contain a red shape?", "yes", "negated: yes or no, colour"),
    ],
)
def test_types_of_questions(text, answer, kind):
    assert Asked(text=text, answer=answer, image=0).kind == kind


def test_a_caption_tells_the_truth():
    for seed in range(20):
        caption = describe("red", "circle", seed=seed)
        assert "red circle" in caption and caption.count(".") == 3
        for absent in ("No circle", "a red shape"):
            assert absent not in caption
    assert describe("red", "circle", seed=1) == describe("red", "circle", seed=1)


def test_a_probe_finds_what_is_there_and_nothing_else():
    draw = np.random.default_rng(0)
    labels = [("red", "blue", "teal")[i % 3] for i in range(300)]
    noise = draw.normal(size=(300, 4))
    states = noise.copy()
    states[:, :2] += [{"red": (9, 0), "blue": (0, 9), "teal": (9, 9)}[label] for label in labels]
    assert probe(states[:200], labels[:200], states[200:], labels[200:]) > 0.97
    # Without the label in the states it can only be guessed: 1/3, within five standard errors.
    assert probe(noise[:200], labels[:200], noise[200:], labels[200:]) < 1 / 3 + 5 * 0.047


def test_emoji_of_two_packages(tmp_path, capsys):
    datasource, base = (tmp_path / name for name in emoji.PACKAGES)
    pictures = datasource / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    (base / "en").mkdir(parents=True)
    rows, about = [], []
    for number in range(12):
        code = f"1F{number:03d}"
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(pictures / f"{code}.png")
        row = dict(unified=f"{code}-FE0F", non_qualified=code, image=f"{code}.png")
        group = dict(category="Food", subcategory="food-fruit", has_img_google=number != 3)
        rows.append(row | group)
        tags = {"tags": ["sweet"]} if number else {}
        about += [{"hexcode": code, "label": f"fruit {number}", **tags}] if number != 4 else []
    (datasource / "emoji.json").write_text(json.dumps(rows))
    (base / "en" / "data.json").write_text(json.dumps(about))
    out = tmp_path / "out"
    emoji.main(["--out", str(out), "--package", str(tmp_path)])
    assert f"{out / 'valid_finetune.json'}: 2 records" in capsys.readouterr().out
    read = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    # Of 12 pictures, one has no image and one no name; the tenth of the rest is held out.
    assert [row["caption"] for row in read["valid_pretrain_mlp"]] == ["fruit 11."]
    captions = [row["caption"] for row in read["pretrain_croc"]]
    assert captions[0] == "The picture shows fruit 0. It belongs to Food: food fruit."
    assert captions[1].startswith("The picture shows fruit 1. It stands for sweet.")
    for row in read["finetune"]:
        question, answer = (turn["value"] for turn in row["conversations"])
        if "group" in row["id"]:
            assert answer == "Food"
        else:  # the picture's number is its name's
            is_own = question.endswith(f"fruit {int(row['image'][2:5])}?")
            assert answer == ("yes" if is_own else "no")
    answers = [row["conversations"][1]["value"] for row in read["finetune"]]
    assert {"yes", "no"} <= set(answers)
    with Image.open(out / "images" / "1F000.png") as picture:
        assert picture.mode == "RGB" and picture.getpixel((5, 5)) == (255, 255, 255)
