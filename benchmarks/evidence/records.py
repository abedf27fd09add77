#!/usr/bin/env python
"""Records of the three stages from easy-VQA: captions, and questions with their true answers.

    python benchmarks/evidence/records.py --out data/easy_vqa

easy-VQA (MIT licence) has 5,000 pictures of 64 x 64 pixels, each of one coloured shape, and 48,248
questions about them with 13 possible answers. It is downloaded by `pip download`, or taken from
`--package FOLDER`, an unpacked package. A caption is written from what the questions tell about a
picture; a picture of which they tell colour or shape only gets no caption.

    OUT/images                   train/N.png and test/N.png
    OUT/{pretrain_mlp,pretrain_croc,finetune}.json     of the package's training pictures
    OUT/valid_*.json             of its test pictures, which no stage trains on
"""

import argparse
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "easy-vqa==1.0"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question of the package."""

    text: str
    answer: str
    image: int

    @property
    def words(self) -> set[str]:
        """Words of the question."""
        return set(self.text.rstrip("?").split())

    @property
    def is_negated(self) -> bool:
        """True for "is there not a ...", "is no ... present"."""
        return bool({"not", "no"} & self.words)

    @property
    def kind(self) -> str:
        """Type of the question: what the most common answer is depends on it."""
        if self.answer in COLOURS:
            return "colour"
        if self.answer in SHAPES:
            return "shape"
        about = "shape" if self.words & set(SHAPES) else "colour"
        return f"{'negated: ' if self.is_negated else ''}yes or no, {about}"


@dataclass
class Facts:
    """Content of one picture, as far as the questions tell it."""

    colour: str | None = None
    shape: str | None = None

    def add(self, word: str) -> None:
        """Note that the picture's shape has this colour, or is of this kind."""
        if word in COLOURS:
            self.colour = word
        elif word in SHAPES:
            self.shape = word


def read_questions(package: Path, split: str) -> list[Asked]:
    """Read the questions of `train` or `test`."""
    path = package / "easy_vqa" / "data" / split / "questions.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Asked(text=text, answer=answer, image=image) for text, answer, image in rows]


def gather_facts(questions: Sequence[Asked]) -> dict[int, Facts]:
    """Collect what the questions and their answers tell about each picture."""
    facts: dict[int, Facts] = {}
    for asked in questions:
        known = facts.setdefault(asked.image, Facts())
        known.add(asked.answer)
        # "what color is the circle?" tells the shape, "is no red shape present?" "no" the colour.
        if asked.answer not in ("yes", "no") or (asked.answer == "yes") != asked.is_negated:
            for word in asked.words:
                known.add(word)
    return facts


def describe(colour: str, shape: str, *, seed: int) -> str:
    """Write a caption of three sentences: content, and two of form, colour and what is absent."""
    draw = random.Random(seed)
    other_colour = draw.choice([c for c in COLOURS if c != colour])
    other_shape = draw.choice([s for s in SHAPES if s != shape])
    first = draw.choice(
        [
            f"The image contains a {colour} {shape}.",
            f"There is a {colour} {shape} in the image.",
            f"A {colour} {shape} is present.",
        ]
    )
    rest = [
        f"The shape is a {shape}.",
        f"The color of the {shape} is {colour}.",
        f"No {other_shape} is present.",
        f"There is not a {other_colour} shape in the image.",
    ]
    draw.shuffle(rest)
    return " ".join([first, *rest[:2]])


def make_records(package: Path, split: str) -> dict[str, list[dict]]:
    """Make the records of each stage from one split of the package."""
    questions = read_questions(package, split)
    name = f"{split}/{{}}.png".format
    known = [
        (image, facts.colour, facts.shape)
        for image, facts in sorted(gather_facts(questions).items())
        if facts.colour and facts.shape
    ]
    asked = [
        {
            "id": f"{split}-{number}",
            "image": name(question.image),
            "conversations": [
                {"from": "human", "value": f"<image>\n{question.text}", "type": question.kind},
                {"from": "gpt", "value": question.answer},
            ],
        }
        for number, question in enumerate(questions)
    ]
    return {
        "pretrain_mlp": [
            {"image": name(image), "caption": f"a {colour} {shape}."}
            for image, colour, shape in known
        ],
        "pretrain_croc": [
            {"image": name(image), "caption": describe(colour, shape, seed=image)}
            for image, colour, shape in known
        ],
        "finetune": asked,
    }


def write_records(package: Path, out: Path, *, held_out: int) -> list[str]:
    """Write all records and link the images; returns a line about each file.

    Args:
        package: unpacked easy-VQA.
        out: folder of the records.
        held_out: number of questions about test pictures, evenly spaced over all of them.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = out / "images"
    images.mkdir(exist_ok=True)
    lines = []
    for split, prefix in {"train": "", "test": "valid_"}.items():
        link = images / split
        if not link.exists():
            link.symlink_to((package / "easy_vqa" / "data" / split / "images").resolve())
        for stage, records in make_records(package, split).items():
            if split == "test" and stage == "finetune":
                records = spread(records, held_out)
            path = out / f"{prefix}{stage}.json"
            path.write_text(json.dumps(records), encoding="utf-8")
            lines.append(f"{path}: {len(records):,} records")
    return lines


def spread(records: list[dict], number: int) -> list[dict]:
    """Return `number` records, evenly spaced; all of them where there are fewer."""
    number = min(number, len(records))
    return [records[i * len(records) // number] for i in range(number)]


def download(folder: Path) -> Path:
    """Download the package with pip and unpack it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "easy_vqa").is_dir():
        words = ("download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE)
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
        (wheel,) = folder.glob("easy_vqa-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--package", type=Path, help="unpacked easy-VQA; default: download it")
    parser.add_argument("--held-out", type=int, default=1500, help="questions to be answered")
    options = parser.parse_args(argv)
    package = options.package or download(options.out / "package")
    print("\n".join(write_records(package, options.out, held_out=options.held_out)))


if __name__ == "__main__":
    main()
