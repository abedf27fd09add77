"""Metrics of answers to questions with known answers, as lmms-eval 0.7.3 defines them.

    pope         answers yes or no: accuracy, precision, recall, F1 (POPE, arXiv 2305.10355)
    vqa          VQAv2's soft accuracy over the answers of several people (arXiv 1612.00837)
    exact_match  equal to a true answer, except for case and punctuation

All are shares from 0 to 1. White space around a generated answer is never compared.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_croc.evaluation.vqa_answers import normalise_vqa

Kind = Literal["pope", "vqa", "exact_match"]

VQA_ENOUGH = 3
"""Number of other people that must have given an answer for it to count in full."""

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Generated answer to one question beside the true ones."""

    text: str
    references: tuple[str, ...]
    """True answers, at least one."""


def pope(answers: Sequence[Judged]) -> dict[str, float]:
    """Compute POPE's metrics; `yes` is the positive class.

    An answer other than yes and no is wrong, but no false negative of the recall. `yes_ratio` is
    the share of answers that are yes; `true_yes_ratio`, of the questions, is what lmms-eval calls
    `pope_yes_ratio`.
    """
    pairs = [(_lower(a.text), _lower(a.references[0])) for a in answers]
    hits = pairs.count(("yes", "yes"))
    precision = _ratio(hits, hits + pairs.count(("yes", "no")))
    recall = _ratio(hits, hits + pairs.count(("no", "yes")))
    return {
        "accuracy": _ratio(sum(said == true for said, true in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(sum(said == "yes" for said, _ in pairs), len(pairs)),
        "true_yes_ratio": _ratio(sum(true == "yes" for _, true in pairs), len(pairs)),
    }


def vqa(answers: Sequence[Judged]) -> dict[str, float]:
    """Compute VQAv2's soft accuracy, the mean over the questions."""
    return {"accuracy": _ratio(sum(map(_soft_accuracy, answers)), len(answers))}


def _soft_accuracy(answer: Judged) -> float:
    """Mean over people left out of min(1, others who gave this answer / 3)."""
    said = normalise_vqa(answer.text)
    is_same = [normalise_vqa(reference) == said for reference in answer.references]
    counts = [sum(is_same) - same for same in is_same]
    return sum(min(1.0, count / VQA_ENOUGH) for count in counts) / len(counts)


def exact_match(answers: Sequence[Judged]) -> dict[str, float]:
    """Compute the share of answers that equal one of their references."""
    right = sum(_plain(a.text) in map(_plain, a.references) for a in answers)
    return {"accuracy": _ratio(right, len(answers))}


METRICS: dict[Kind, Callable[[Sequence[Judged]], dict[str, float]]] = {
    "pope": pope,
    "vqa": vqa,
    "exact_match": exact_match,
}


def _lower(text: str) -> str:
    return text.lower().strip()


def _plain(text: str) -> str:
    return text.strip().lower().translate(_WITHOUT_PUNCTUATION)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
