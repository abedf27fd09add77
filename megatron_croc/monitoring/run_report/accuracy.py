"""Accuracy on held-out questions, from the file that `croc generate --report` wrote.

RUN_DIR/<stage>/accuracy.json    a row per type of question, the last one for all of them
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_croc.errors import DataError
from megatron_croc.file_reading import build, parse_json, read_limited
from megatron_croc.monitoring.run_report.page import Section
from megatron_croc.monitoring.run_report.stages import StageRun, Table

TOTAL = "all"
"""Name of the row for all questions."""

MARK = "*"
"""Stands beside a type that is above chance by more than two standard errors."""


@dataclass(frozen=True, kw_only=True)
class TypeAccuracy:
    """One type of question."""

    kind: str
    num_questions: int
    accuracy: float
    """Share of exact matches."""

    standard_error: float
    """Of `accuracy`."""

    chance: float
    """Share that the type's most common answer gets."""

    is_above_chance: bool
    """By more than two standard errors."""

    most_common: str | None
    """That answer; None in the row for all questions."""

    def __str__(self) -> str:
        """`count (79.4% right, 52.6% by chance)`."""
        return f"{self.kind} ({self.accuracy:.1%} right, {self.chance:.1%} by chance)"


def answer_sections(stages: Sequence[StageRun]) -> list[Section]:
    """Learned and not yet learned types of question; empty for stages where none were asked."""
    found = [(stage.name, rows) for stage in stages if (rows := read_accuracy(stage))]
    return [
        Section(
            title=f"What the model has learned: held-out questions, after {name}",
            paragraphs=[
                summarise(rows),
                "Right is an exact match, always taking the most likely token, with its binomial "
                "standard error. Chance is what the type's most common answer would get, which "
                f"needs no look at the image. {MARK} marks a type that is above chance by more "
                "than two standard errors of the difference; luck marks about one type in 40.",
            ],
            tables=[accuracy_table(rows)],
        )
        for name, rows in found
    ]


def read_accuracy(stage: StageRun) -> list[TypeAccuracy]:
    """Rows of a stage's accuracy.json; empty without the file.

    Raises:
        DataError: the file is not such a report.
    """
    path = stage.checkpoint.parent / "accuracy.json"
    if not path.exists():
        return []
    names = TypeAccuracy.__dataclass_fields__
    try:
        rows = parse_json(read_limited(path))
        return [build(TypeAccuracy, {name: row[name] for name in names}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no report of accuracy: write it again with `croc generate --report`, or "
            "remove it"
        ) from error


def summarise(rows: Sequence[TypeAccuracy]) -> str:
    """One paragraph: the types clearly above chance, best first, and the number of the others."""
    types = [row for row in rows if row.kind != TOTAL]
    clear = [row for row in types if row.is_above_chance]
    clear.sort(key=lambda row: row.chance - row.accuracy)
    if not clear:
        return (
            f"No type of question is clearly above chance (of {len(types)}): the model has "
            "learned the words of the answers, not yet to choose among them by the image. It needs "
            "more steps, or more images."
        )
    text = f"Clearly above chance: {', '.join(map(str, clear))}."
    others = len(types) - len(clear)
    return f"{text} Not yet clearly above it: the other {others}." if others else text


def accuracy_table(rows: Sequence[TypeAccuracy]) -> Table:
    """A line per type of question; MARK beside the accuracy of those clearly above chance."""
    return [
        ["type of question", "questions", "right", "chance", "above chance", "most common answer"]
    ] + [
        [
            row.kind,
            f"{row.num_questions}",
            f"{row.accuracy:.1%} \u00b1 {row.standard_error:.1%}",
            f"{row.chance:.1%}",
            f"{row.accuracy - row.chance:+.1%}{' ' + MARK if row.is_above_chance else ''}",
            row.most_common or "-",
        ]
        for row in rows
    ]
