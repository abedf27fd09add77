"""Choice of the strangest samples: those farthest from the middle of the dataset in any feature.

    features of each sample --robust z: |x - median| / spread--> largest z --> the strangest first

A feature fills a quarter of the places at most, so one odd kind does not hide the others.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_croc.data.look.facts import Facts

NOTICEABLE = 3.0
"""Robust z from which a feature is named as a reason."""

MAX_Z = 50.0

Feature = Callable[[Facts], float | None]


@dataclass(frozen=True, kw_only=True)
class Strange:
    """One strange sample."""

    facts: Facts
    reasons: list[str]
    """Features in which it stands out, the strongest first."""


def _largest_aspect(facts: Facts) -> float | None:
    return max((abs(math.log(image.aspect)) for image in facts.images), default=None)


def _most_extreme(facts: Facts) -> str:
    image = max(facts.images, key=lambda i: abs(math.log(i.aspect)))
    return f"{image.width} x {image.height}"


def _smallest_side(facts: Facts) -> float | None:
    sides = [min(image.width, image.height) for image in facts.images]
    return math.log(min(sides)) if sides else None


def _label_share(facts: Facts) -> float | None:
    extent = facts.extent
    return None if extent is None else len(extent.labels) / max(extent.length, 1)


def _characters_per_token(facts: Facts) -> float | None:
    if facts.extent is None or not facts.characters:
        return None
    return facts.characters / facts.extent.length


FEATURES: dict[str, tuple[Feature, Callable[[Facts], str]]] = {
    "length": (
        lambda f: None if f.extent is None else math.log(max(f.extent.length, 1)),
        lambda f: f"{f.extent.length if f.extent else 0} tokens",
    ),
    "labels": (
        lambda f: None if f.extent is None else math.log(len(f.extent.labels) + 1),
        lambda f: f"{len(f.extent.labels) if f.extent else 0} labels",
    ),
    "label share": (_label_share, lambda f: f"labels are {_label_share(f) or 0:.0%} of the tokens"),
    "images": (lambda f: float(f.num_images), lambda f: f"{f.num_images} images"),
    "turns": (lambda f: float(f.num_turns), lambda f: f"{f.num_turns} messages"),
    "aspect": (
        _largest_aspect,
        lambda f: f"image of {_most_extreme(f)} pixels",
    ),
    "image size": (
        _smallest_side,
        lambda f: f"short side of {min(min(i.width, i.height) for i in f.images)} pixels",
    ),
    "symbols": (
        lambda f: f.symbols / max(f.symbols + sum(f.scripts.values()), 1),
        lambda f: f"{f.symbols} symbols beside {sum(f.scripts.values())} letters",
    ),
    "characters per token": (
        _characters_per_token,
        lambda f: f"{_characters_per_token(f) or 0:.1f} characters per token",
    ),
}
"""Name -> value of a sample (None: it has none), and the words for it."""


UPWARDS = ("aspect",)
"""Features in which only large values are strange: a square image is not."""


def choose_strangest(found: Sequence[Facts], number: int) -> list[Strange]:
    """Choose the strangest samples, the strangest first."""
    scores: list[dict[str, float]] = [{} for _ in found]
    for name, (feature, _) in FEATURES.items():
        values = [feature(facts) for facts in found]
        for place, z in _robust_z(values, upwards=name in UPWARDS).items():
            scores[place][name] = z
    common = Counter(facts.script for facts in found if facts.extent).most_common(1)
    for facts, score in zip(found, scores, strict=True):
        if facts.fault is not None:
            score["fault"] = MAX_Z
        if common and facts.script != common[0][0] and facts.extent is not None:
            share = sum(f.script == facts.script for f in found) / len(found)
            score["script"] = min(-math.log(share) * 3, MAX_Z)
    ranked = sorted(
        ((max(score.values(), default=0.0), -n) for n, score in enumerate(scores)), reverse=True
    )
    medians = _medians(found)
    used: Counter[str] = Counter()
    chosen: list[Strange] = []
    for z, negative in ranked:
        facts, score = found[-negative], scores[-negative]
        if z <= 0 or len(chosen) == number:
            break
        first = max(score, key=score.__getitem__)
        if used[first] >= math.ceil(number / 4):
            continue
        used[first] += 1
        named = [n for n in sorted(score, key=lambda n: -score[n]) if score[n] >= NOTICEABLE]
        chosen.append(
            Strange(facts=facts, reasons=[_words(facts, n, medians) for n in named or [first]])
        )
    return chosen


def _medians(found: Sequence[Facts]) -> dict[str, int]:
    """Return the medians that are named beside a strange value."""
    extents = [facts.extent for facts in found if facts.extent is not None]
    if not extents:
        return {}
    return {
        "length": int(np.median([extent.length for extent in extents])),
        "labels": int(np.median([len(extent.labels) for extent in extents])),
    }


def _words(facts: Facts, name: str, medians: dict[str, int]) -> str:
    if name == "fault":
        assert facts.fault is not None
        return f"bad ({facts.fault.kind})"
    if name == "script":
        return f"script {facts.script}"
    beside = f" (median {medians[name]})" if name in medians else ""
    return FEATURES[name][1](facts) + beside


def _robust_z(values: Sequence[float | None], *, upwards: bool) -> dict[int, float]:
    """Return the distance from the median in units of the spread, by place."""
    places = [place for place, value in enumerate(values) if value is not None]
    known = np.array([values[place] for place in places], dtype=float)
    if not len(known):
        return {}
    above = known - np.median(known)
    distance = np.abs(above)
    spread = 1.4826 * np.median(distance) or distance.std()  # most values equal: the plain spread
    if upwards:
        distance = np.maximum(above, 0)
    if not spread:
        return {}
    return dict(zip(places, np.minimum(distance / spread, MAX_Z).tolist(), strict=True))
