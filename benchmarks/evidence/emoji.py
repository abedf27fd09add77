#!/usr/bin/env python
"""Records of the three stages from emoji pictures, with their names, keywords and groups.

    python benchmarks/evidence/emoji.py --out data/emoji

Two packages of npm, fetched by `npm pack`: emoji-datasource-google has the pictures (64 x 64, Noto
Emoji, Apache 2.0; the package itself MIT), emojibase-data names and keywords (MIT). `--package
FOLDER` is a folder in which they lie, unpacked. Every tenth picture is held out.

    OUT/images                   on a white ground
    OUT/{pretrain_mlp,pretrain_croc,finetune}.json     names; sentences; questions
    OUT/valid_*.json             of the pictures that are held out
"""

import argparse
import json
import random
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

PACKAGES = {"emoji-datasource-google": "16.0.0", "emojibase-data": "17.0.0"}
HELD_OUT = 10
"""One picture in so many is held out."""


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One picture and the words about it."""

    file: Path
    label: str
    keywords: tuple[str, ...]
    group: str
    part: str
    """Part of the group, such as `animal-mammal`."""

    @property
    def sentences(self) -> str:
        """A caption of three sentences, or of two without keywords."""
        keywords = f" It stands for {', '.join(self.keywords)}." if self.keywords else ""
        part = self.part.replace("-", " ")
        return f"The picture shows {self.label}.{keywords} It belongs to {self.group}: {part}."


def read_emoji(folder: Path) -> list[Emoji]:
    """Join the two packages; a picture without a name in the second is left out.

    Args:
        folder: holds a folder for each package.
    """
    datasource, base = (folder / name for name in PACKAGES)
    about: dict[str, dict[str, Any]] = {
        row["hexcode"]: row for row in _read(base / "en" / "data.json")
    }
    found = []
    for row in sorted(_read(datasource / "emoji.json"), key=lambda row: row["unified"]):
        named = about.get(row["unified"]) or about.get(row["non_qualified"] or "")
        if named is None or not row["has_img_google"]:
            continue
        found.append(
            Emoji(
                file=datasource / "img" / "google" / "64" / row["image"],
                label=named["label"],
                keywords=tuple(named.get("tags", ())),
                group=row["category"],
                part=row["subcategory"],
            )
        )
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def make_records(emoji: Sequence[Emoji]) -> dict[str, list[dict[str, Any]]]:
    """Make the records of each stage."""
    questions = []
    for number, one in enumerate(emoji):
        draw = random.Random(one.label)
        others = [e.label for e in emoji if e.group == one.group and e.label != one.label]
        is_own = draw.random() < 0.5 or not others
        label = one.label if is_own else draw.choice(others)
        asked = [
            ("group", "To which group does this belong?", one.group),
            ("name: yes or no", f"Is this {label}?", "yes" if is_own else "no"),
        ]
        for kind, question, answer in asked:
            turns = [
                {"from": "human", "value": f"<image>\n{question}", "type": kind},
                {"from": "gpt", "value": answer},
            ]
            name = f"{number}-{kind.split(':')[0]}"
            questions.append({"id": name, "image": one.file.name, "conversations": turns})
    return {
        "pretrain_mlp": [{"image": e.file.name, "caption": f"{e.label}."} for e in emoji],
        "pretrain_croc": [{"image": e.file.name, "caption": e.sentences} for e in emoji],
        "finetune": questions,
    }


def write_records(emoji: Sequence[Emoji], out: Path) -> list[str]:
    """Write records and pictures; returns a line about each file of records."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    for one in emoji:
        picture = Image.open(one.file).convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        Image.alpha_composite(ground, picture).convert("RGB").save(images / one.file.name)
    held_out = [one for number, one in enumerate(emoji) if number % HELD_OUT == HELD_OUT - 1]
    trained = [one for number, one in enumerate(emoji) if number % HELD_OUT != HELD_OUT - 1]
    lines = []
    for prefix, part in {"": trained, "valid_": held_out}.items():
        for stage, records in make_records(part).items():
            path = out / f"{prefix}{stage}.json"
            path.write_text(json.dumps(records), encoding="utf-8")
            lines.append(f"{path}: {len(records):,} records")
    return lines


def download(folder: Path) -> Path:
    """Fetch both packages with npm and unpack them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in PACKAGES.items():
        if (folder / name).is_dir():
            continue
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(folder / f"{name}-{version}.tgz") as archive:
            archive.extractall(folder, filter="data")
        (folder / "package").rename(folder / name)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--package", type=Path, help="unpacked packages; default: download them")
    options = parser.parse_args(argv)
    emoji = read_emoji(options.package or download(options.out / "package"))
    print("\n".join(write_records(emoji, options.out)))


if __name__ == "__main__":
    main()
