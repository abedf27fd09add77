"""Comparison of two surveys: what has changed in the data since an earlier look."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_croc.data.look.survey import FORMAT, VERSION
from megatron_croc.errors import DataError, first_line
from megatron_croc.file_reading import UnreadableError, read_json

NOTICED = 0.01
"""Smallest change of a share that is told."""

NOTICED_RATIO = 0.05
"""Smallest relative change of a length or size that is told."""

_SETTINGS = ("stage", "template", "seq_length", "visual_tokens", "tokenizer", "num_samples")
_DISTRIBUTIONS = {
    "images_per_sample": "samples with {} image(s)",
    "turns": "samples of {} message(s)",
    "aspects": "images of width / height {}",
    "short_sides": "images with a short side of {} pixels",
    "image_formats": "{} images",
    "scripts": "samples in script {}",
}
_QUANTITIES = {"tokens": "tokens", "labels": "labels", "width": "width", "height": "height"}
_TOLD_QUANTILES = ("50", "99", "100")


def read_survey(path: Path) -> dict[str, Any]:
    """Read the JSON of an earlier look.

    Raises:
        DataError: it is missing, or no such file.
    """
    try:
        tree = read_json(path)
    except (OSError, UnreadableError) as error:
        raise DataError(f"--compare {path} cannot be read: {first_line(error)}") from error
    if tree.get("format") != FORMAT:
        raise DataError(f"--compare {path} was not written by croc data check: give its check.json")
    if tree.get("version") != VERSION:
        raise DataError(
            f"--compare {path} has version {tree.get('version')}, this code reads {VERSION}: run "
            "croc data check on that folder again"
        )
    return tree


def compare_surveys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what has changed, a line each; empty if nothing has."""
    lines = []
    if before["digest"] == now["digest"]:
        lines.append("the samples are the same (equal digests of the shards)")
    lines += _changed_settings(before, now)
    for name, words in _DISTRIBUTIONS.items():
        lines += _changed_shares(before[name], now[name], words)
    lines += _changed_shares(
        before["bad"], now["bad"], "bad samples ({})", before["num_looked_at"], now["num_looked_at"]
    )
    for name, words in _QUANTITIES.items():
        lines += _changed_quantiles(before[name], now[name], words)
    for words, old, new in (
        ("samples of text only", before["text_only_share"], now["text_only_share"]),
        ("labels lost by the cut", *(_lost(tree) for tree in (before, now))),
        ("repeated images", *(tree["equal_images"]["share"] for tree in (before, now))),
        ("repeated texts", *(tree["equal_texts"]["share"] for tree in (before, now))),
    ):
        if abs(new - old) >= NOTICED:
            lines.append(f"{words}: {old:.1%} -> {new:.1%}")
    return lines


def _lost(tree: Mapping[str, Any]) -> float:
    return tree["truncation"]["share_of_labels_lost"]


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in _SETTINGS:
        if before[name] != now[name]:
            yield f"{name}: {_plain(before[name])} -> {_plain(now[name])}"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inside}" for key, inside in value.items())
    return str(value)


def _changed_shares(
    before: Mapping[str, int],
    now: Mapping[str, int],
    words: str,
    all_before: int | None = None,
    all_now: int | None = None,
) -> Iterator[str]:
    """Compare shares of classes; a class that appears or disappears is told at any share."""
    totals = [all_before or sum(before.values()), all_now or sum(now.values())]
    for name in dict.fromkeys((*before, *now)):
        counts = [before.get(name, 0), now.get(name, 0)]
        old, new = (n / total if total else 0.0 for n, total in zip(counts, totals, strict=True))
        if abs(new - old) >= NOTICED or (counts[0] == 0) != (counts[1] == 0):
            yield f"{words.format(name)}: {old:.1%} -> {new:.1%}"


def _changed_quantiles(
    before: Mapping[str, int], now: Mapping[str, int], words: str
) -> Iterator[str]:
    for q in _TOLD_QUANTILES:
        old, new = before.get(q), now.get(q)
        if old is None or new is None:
            continue
        if abs(new - old) > NOTICED_RATIO * max(old, 1):
            name = {"50": "median", "100": "largest"}.get(q, f"{q}th percentile")
            yield f"{words}, {name}: {old} -> {new}"
