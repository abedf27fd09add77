"""Accuracy of answers by type of question, compared with chance: a model that sees no image.

A right answer matches exactly, except for case, spaces and a full stop at the end. Chance is the
accuracy of a model that knows only the type of a question and always gives the type's most common
answer. This answer is counted in the training data if given, else in the questions.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically
from megatron_croc.evaluation.prompts import Answer
from megatron_croc.evaluation.questions import Question

TOTAL = "all"
"""Name of the last row, of all questions; its chance also knows the types."""

UNTYPED = "untyped"
"""Name of the questions without a type."""


NUM_ERRORS = 2
"""Number of standard errors above chance from which a type is marked."""

MIN_QUESTIONS = 10
"""Number of questions below which a type is never marked."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy on one type of question."""

    kind: str
    num_questions: int
    num_right: int
    num_by_chance: int
    """Number of questions whose true answer is the most common one."""

    most_common: str | None
    """Most common answer; None in the row of all types."""

    counted_in: str
    """`training` or `questions`: data in which the most common answer was counted."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num_questions

    @property
    def chance(self) -> float:
        """Share of right answers if the answer is always the most common one."""
        return self.num_by_chance / self.num_questions

    @property
    def standard_error(self) -> float:
        """Standard error of `accuracy`: binomial."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_questions)

    @property
    def is_above_chance(self) -> bool:
        """True when accuracy is above chance by more than two standard errors of the difference.

        Accuracy p and chance q are both shares of the n questions: the difference has the error
        sqrt((p (1 - p) + q (1 - q)) / n). Always False below MIN_QUESTIONS.
        """
        variance = self.accuracy * (1 - self.accuracy) + self.chance * (1 - self.chance)
        error = math.sqrt(variance / self.num_questions)
        return (
            self.num_questions >= MIN_QUESTIONS and self.accuracy - self.chance > NUM_ERRORS * error
        )


def normalise(text: str) -> str:
    """Return the form of an answer that is compared."""
    return " ".join(text.lower().split()).removesuffix(".").strip()


def accuracy_by_type(
    answers: Iterable[Answer], training: Sequence[Question] | None = None
) -> list[Accuracy]:
    """Compute one row per type in alphabetical order, then one for all.

    Args:
        answers: answers; those without a true answer are not counted.
        training: questions of the training data with their answers.
    """
    judged: dict[str, list[tuple[str, str]]] = {}
    for answer in answers:
        if answer.question.expected is not None:
            pair = normalise(answer.question.expected), normalise(answer.text)
            judged.setdefault(answer.question.kind or UNTYPED, []).append(pair)
    counts: dict[str, Counter[str]] = {}
    for question in training or ():
        if question.expected is not None:
            kind = question.kind or UNTYPED
            counts.setdefault(kind, Counter())[normalise(question.expected)] += 1
    rows = []
    for kind, pairs in sorted(judged.items()):
        known = counts.get(kind)
        true = Counter(expected for expected, _ in pairs)
        ((most_common, _),) = (known or true).most_common(1)
        rows.append(
            Accuracy(
                kind=kind,
                num_questions=len(pairs),
                num_right=sum(expected == said for expected, said in pairs),
                num_by_chance=true[most_common],
                most_common=most_common,
                counted_in="training" if known else "questions",
            )
        )
    places = {row.counted_in for row in rows}
    total = Accuracy(
        kind=TOTAL,
        num_questions=sum(row.num_questions for row in rows),
        num_right=sum(row.num_right for row in rows),
        num_by_chance=sum(row.num_by_chance for row in rows),
        most_common=None,
        counted_in=places.pop() if len(places) == 1 else "both",
    )
    return [*rows, total]


def as_table(rows: Sequence[Accuracy]) -> Iterator[str]:
    """Format the rows as a table for the terminal."""
    width = max(len("type"), *(len(row.kind) for row in rows))
    yield f"{'type':<{width}}  questions   right  +-s.e.  chance    most common answer"
    for row in rows:
        mark = "*" if row.is_above_chance else " "
        yield (
            f"{row.kind:<{width}}  {row.num_questions:>9}  {row.accuracy:>6.1%}"
            f"  {row.standard_error:>6.1%}  {row.chance:>6.1%} {mark}"
            f"  {row.most_common or ''}"
        ).rstrip()
    where = {
        "training": "in the training data",
        "questions": "in these very questions",
        "both": "in the training data where it has the type, else in these very questions",
    }[rows[-1].counted_in]
    yield "right: exact match. +-s.e.: its binomial standard error"
    yield f"*: above chance by more than {NUM_ERRORS} standard errors of the difference"
    yield f"chance: always the type's most common answer, counted {where}"


def write_report(path: Path, rows: Sequence[Accuracy]) -> None:
    """Write the rows as a JSON list."""
    derived = ("accuracy", "standard_error", "chance", "is_above_chance")
    records = [asdict(row) | {name: getattr(row, name) for name in derived} for row in rows]
    write_atomically(path, (json.dumps(records, indent=1) + "\n").encode())


def as_record(answer: Answer) -> dict[str, Any]:
    """Build the record of LLaVA's evaluation scripts, with what else is known."""
    question = answer.question
    record = {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": answer.text,
        "num_tokens": len(answer.ids),
        "is_finished": answer.is_finished,
        "expected": question.expected,
        "type": question.kind,
    }
    return {name: value for name, value in record.items() if value is not None}
