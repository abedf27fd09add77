"""Every command of docs/own_pictures.md, run in order on a few made pictures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own_pictures.md"
COLOURS = {"boat": "red", "hat": "blue", "leaf": "green", "lemon": "yellow", "snow": "white"}
NUM_OF_EACH = 3
FIRST_SECTION, LAST_SECTION = 1, 5
"""Sections whose commands go on from one another; the later ones are about other data."""


def commands(section: int) -> str:
    """The code blocks of one section."""
    (text,) = re.findall(
        rf"^## {section}\. .*?(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`croc` and `python` of this interpreter, few steps, one thread."""
    bin_folder = tmp_path_factory.mktemp("bin")
    scripts = {"croc": f'exec "{sys.executable}" -m megatron_croc "$@"'}
    scripts["python"] = f'exec "{sys.executable}" "$@"'
    for name, text in scripts.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    chosen = {"PATH": path, "PYTHONPATH": str(ROOT), "STEPS": "2", "OMP_NUM_THREADS": "1"}
    return os.environ | chosen


def run(script: str, folder: Path, environment: dict[str, str]) -> str:
    """Output of a script that must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    for number in range(NUM_OF_EACH):
        for name, colour in COLOURS.items():
            stem = name if number == 0 else f"{name}{number}"
            suffix = "png" if number == 1 else "jpg"
            Image.new("RGB", (150 + 40 * number, 130), colour).save(folder / f"{stem}.{suffix}")
            (folder / f"{stem}.txt").write_text(f"A {colour} {name} seen from the side.\n")


@pytest.fixture(scope="module")
def followed(environment: dict[str, str], tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """The folder after the page was followed, and the output of each section."""
    folder = tmp_path_factory.mktemp("own")
    write_pictures(folder / "pictures")
    sections = range(FIRST_SECTION, LAST_SECTION + 1)
    return folder, {number: run(commands(number), folder, environment) for number in sections}


def test_every_section_has_its_commands():
    named = [
        ["captions.json", "questions.json", "valid_questions.json"],
        ["croc data tokenizer", "croc data preprocess"],
        ["croc data inspect"],
        ["croc train --recipe tiny/pretrain_croc", "croc train --recipe tiny/finetune"],
        ["croc generate --model runs/finetune --image"],
        ["easy_vqa"],
    ]
    for section, words in enumerate(named, start=FIRST_SECTION):
        assert all(word in commands(section) for word in words)
    assert PAGE.read_text().count("```bash") == sum(
        bool(commands(section)) for section in range(1, 7)
    )


def test_the_records_are_made_and_none_is_skipped(followed: tuple[Path, dict[int, str]]):
    folder, said = followed
    assert said[1] == "12 records for training, 3 held out\n"
    counts = dict(captions=12, questions=12, valid_questions=3)
    for name, count in counts.items():
        assert len(json.loads((folder / f"{name}.json").read_text())) == count
        manifest = json.loads((folder / "shards" / name / "manifest.json").read_text())
        assert manifest["num_samples"] == count
    assert said[2].count(" 0 skipped") == 3 and "tokenizer.model: " in said[2]


def test_a_look_shows_question_and_answer(followed: tuple[Path, dict[int, str]]):
    folder, said = followed
    text = re.sub(r"[|\[\]]", "", said[3])  # marks between tokens, and of supervised ones
    assert "Whatdoesthepictureshow?ASSISTANT:A" in text and "seenfromtheside." in text
    assert "<img" in (folder / "look" / "index.html").read_text()


def test_the_second_stage_starts_from_the_first(followed: tuple[Path, dict[int, str]]):
    folder, said = followed
    for stage in ("pretrain_croc", "finetune"):
        assert (folder / "runs" / stage / "iter_0000002").is_dir()
    assert "weights from runs/pretrain_croc" in said[4]


def test_questions_are_answered(followed: tuple[Path, dict[int, str]]):
    folder, said = followed
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["<image>\nWhat does the picture show?"] * 3
    rows = json.loads((folder / "accuracy.json").read_text())
    assert rows[-1]["kind"] == "all" and rows[-1]["num_questions"] == 3
    assert "type" in said[5]


def test_easy_vqa_becomes_records(environment: dict[str, str], tmp_path: Path):
    """The package's functions on a few pictures; the package itself is 5,000 of them."""
    package, work = tmp_path / "packages" / "easy_vqa", tmp_path / "work"
    work.mkdir()
    num_images = 6
    for split in ("train", "test"):
        folder = package / "data" / split / "images"
        folder.mkdir(parents=True)
        for number in range(num_images):
            Image.new("RGB", (64, 64), "red").save(folder / f"{number}.png")
    pairs = [
        ("what color is the shape?", "red"),
        ("what shape is in the image?", "circle"),
        ("is there a red shape?", "yes"),
        ("does the image not contain a circle?", "no"),
    ]
    columns = [[*column] * num_images for column in zip(*pairs, strict=True)]
    columns.append([number for number in range(num_images) for _ in pairs])
    (package / "__init__.py").write_text(
        f"def get_train_questions():\n    return {columns!r}\nget_test_questions = "
        "get_train_questions\ndef get_answers():\n    return ['yes', 'no', 'circle', "
        "'rectangle', 'triangle', 'red']\n"
    )
    where = environment | {"PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}"}
    said = run(commands(6), work, where)
    assert said == "6 captions, 8 questions, 2 held out\n"
    records = json.loads((work / "questions.json").read_text())
    kinds = {r["conversations"][1]["value"]: r["conversations"][0]["type"] for r in records}
    assert kinds == {
        "red": "colour",
        "circle": "shape",
        "yes": "yes or no, colour",
        "no": "negated: yes or no, shape",
    }
    assert json.loads((work / "captions.json").read_text())[0]["caption"] == "A red circle."
    said = run(commands(2), work, where)
    assert said.count(" 0 skipped") == 3 and "6 samples (6 images" in said
