"""Survey of a dataset: counts and distributions over its samples, as one tree for JSON and page."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.data.look.facts import Facts
from megatron_croc.data.sample.tokenization import Tokenizer
from megatron_croc.data.truncation import TruncationCount

FORMAT = "megatron_croc data check"
VERSION = 1

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
NUM_EXAMPLES = 5
"""Examples of each kind of fault, and groups of equal images or texts."""

ASPECTS = (0.2, 0.4, 0.6, 0.8, 1.25, 1.67, 2.5, 5.0)
"""Bounds of the classes of width over height."""

SIDES = (64, 128, 224, 336, 512, 768, 1024, 2048)
"""Bounds of the classes of the short side, pixels."""


def choose_samples(num_samples: int, max_samples: int) -> list[int]:
    """Choose samples evenly over the dataset; all if there are no more than `max_samples` or it
    is 0."""
    if not max_samples or num_samples <= max_samples:
        return list(range(num_samples))
    return np.linspace(0, num_samples - 1, max_samples).round().astype(int).tolist()


def make_survey(
    run: RunConfig,
    tokenizer: Tokenizer,
    found: Sequence[Facts],
    *,
    num_samples: int,
    digest: str,
) -> dict[str, Any]:
    """Count everything.

    Args:
        run: the run that is to train on the samples.
        tokenizer: its tokenizer.
        found: the samples looked at.
        num_samples: samples of the dataset.
        digest: of its content.
    """
    truncation = {name: TruncationCount(run.data.seq_length) for name in _sources(found)}
    whole = TruncationCount(run.data.seq_length)
    for facts in found:
        if facts.extent is not None:
            truncation[facts.source].add(facts.extent)
            whole.add(facts.extent)
    extents = [facts.extent for facts in found if facts.extent is not None]
    images = [image for facts in found for image in facts.images]
    faults = Counter(str(facts.fault.kind) for facts in found if facts.fault is not None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "folders": list(run.data.data_path),
        "digest": digest,
        "num_samples": num_samples,
        "num_looked_at": len(found),
        "stage": run.stage,
        "template": run.data.conversation_template,
        "seq_length": run.data.seq_length,
        "visual_tokens": run.model.vision_tower.num_visual_tokens,
        "tokenizer": {
            "name": tokenizer.name,
            "size": tokenizer.size,
            "legacy": tokenizer.legacy if tokenizer.adds_prefix else None,
        },
        "images_per_sample": _histogram(facts.num_images for facts in found),
        "text_only_share": _share(sum(not f.num_images for f in found), len(found)),
        "turns": _histogram(facts.num_turns for facts in found),
        "tokens": _quantiles([e.length for e in extents]),
        "labels": _quantiles([len(e.labels) for e in extents]),
        "truncation": whole.as_tree() | {"proposed_seq_length": whole.proposed_seq_length},
        "truncation_by_source": {name: count.as_tree() for name, count in truncation.items()},
        "width": _quantiles([image.width for image in images]),
        "height": _quantiles([image.height for image in images]),
        "aspects": _classes([image.aspect for image in images], ASPECTS),
        "short_sides": _classes([min(i.width, i.height) for i in images], SIDES),
        "image_formats": dict(Counter(image.format for image in images).most_common()),
        "scripts": dict(Counter(facts.script for facts in found).most_common()),
        "equal_images": _repeats((image.digest, f.sample_id) for f in found for image in f.images),
        "equal_texts": _repeats((f.text_digest, f.sample_id) for f in found if f.text_digest),
        "bad": dict(faults.most_common()),
        "bad_examples": [
            {"sample": f.sample_id, "kind": f.fault.kind, "reason": f.fault.reason}
            for kind in faults
            for f in [f for f in found if f.fault is not None and f.fault.kind == kind][
                :NUM_EXAMPLES
            ]
            if f.fault is not None
        ],
    }


def _sources(found: Iterable[Facts]) -> list[str]:
    return list(dict.fromkeys(facts.source for facts in found))


def _share(part: float, whole: float) -> float:
    return round(part / whole, 6) if whole else 0.0


def _histogram(values: Iterable[int]) -> dict[str, int]:
    """Count whole numbers, ascending; from 10 on in one class."""
    counts = Counter(min(value, 10) for value in values)
    return {("10+" if value == 10 else str(value)): counts[value] for value in sorted(counts)}


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return percentiles, each a value that occurs; empty without values."""
    if not values:
        return {}
    found = np.percentile(np.array(values), QUANTILES, method="inverted_cdf")
    return {str(q): int(value) for q, value in zip(QUANTILES, found, strict=True)}


def _classes(values: Sequence[float], bounds: Sequence[float]) -> dict[str, int]:
    """Count values between bounds; empty classes at both ends are left out."""
    if not values:
        return {}
    names = [f"< {bounds[0]:g}"]
    names += [f"{a:g} - {b:g}" for a, b in pairwise(bounds)]
    names += [f">= {bounds[-1]:g}"]
    counts = np.bincount(np.digitize(values, bounds), minlength=len(names))
    inside = np.flatnonzero(counts)
    return {names[i]: int(counts[i]) for i in range(inside[0], inside[-1] + 1)}


def _repeats(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Count what occurs again: (digest, sample) -> number of repeats and the largest groups."""
    groups: dict[str, list[str]] = defaultdict(list)
    for digest, sample in pairs:
        groups[digest].append(sample)
    total = sum(map(len, groups.values()))
    largest = sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)
    return {
        "num_repeats": total - len(groups),
        "share": _share(total - len(groups), total),
        "largest": [{"count": len(g), "samples": g[:3]} for g in largest[:NUM_EXAMPLES]],
    }
