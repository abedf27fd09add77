"""Splits of a dataset: held-out records must not be trained on unless the user asks for it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_croc.data.bad_samples import BadSampleError

ALL_SPLITS = "all"

_SPLITS = {
    "train": "train", "training": "train", "trn": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation", "evaluation": "validation", "holdout": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_FIELDS = ("split", "subset")


def wanted_splits(split: Sequence[str]) -> frozenset[str]:
    """Return the splits that a user asks for under their usual names; nothing asked: empty."""
    return frozenset(_SPLITS.get(name.lower(), name) for name in split)


def split_of(parts: Sequence[str]) -> str | None:
    """Return the split that a file's name says, else its nearest folder; None: neither does."""
    for part in reversed(parts):
        words = [_SPLITS[w] for w in re.split(r"[^a-z]+", part.lower()) if w in _SPLITS]
        if words:
            return "train" if "train" in words else words[0]
    return None


def check_split(
    record: Mapping[str, Any], wanted: frozenset[str], sample_id: str, folder: str | None = None
) -> None:
    """Refuse a record that says that it is held out, unless its split is wanted.

    Args:
        record: a record; its field `split` says its split.
        wanted: splits to take; empty: train.
        sample_id: name used in errors.
        folder: first folder of its image in an image folder; may be the name of a split.

    Raises:
        BadSampleError: the record is of another split.
    """
    if ALL_SPLITS in wanted:
        return
    values = [record.get(name) for name in _FIELDS]
    for value in (*values, folder):
        told = _SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
        if told is not None and told not in (wanted or ("train",)):
            raise BadSampleError(
                sample_id, "other_split", f"it is of split {told}: --split {told} asks for it"
            )
