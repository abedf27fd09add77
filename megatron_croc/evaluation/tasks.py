"""Local tasks: a file of questions with true answers, and the metric they are judged by.

    task: demo_existence          # its name in results
    kind: pope                    # pope | vqa | exact_match, see metrics.py
    questions: existence.jsonl    # as croc generate reads them, with "answer", "answers" or rounds
    images: images                # folder of the images; default: that of the questions
    post_prompt: "\\nAnswer the question using a single word or phrase."    # default: none
    max_new_tokens: 16            # default 32

Paths are relative to the task file. A task is checked as a whole before any model is loaded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_croc.errors import DataError
from megatron_croc.evaluation.metrics import METRICS, VQA_ENOUGH, Judged, Kind
from megatron_croc.evaluation.questions import Question, read_questions
from megatron_croc.file_reading import UnreadableError, build, read_yaml

ALL = "all"
"""Name of the last row of a result, of all questions."""

UNTYPED = "untyped"
"""Category of the questions without a type."""


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """Content of a task file; see above."""

    task: str
    kind: Kind
    questions: str
    images: str | None = None
    post_prompt: str = ""
    max_new_tokens: int = 32


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """A local task, read and checked."""

    name: str
    kind: Kind
    questions: tuple[Question, ...]
    """Questions with `post_prompt` at their ends; each has references."""

    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class CategoryResult:
    """Metrics of one type of question."""

    category: str
    num_questions: int
    metrics: dict[str, float]


def read_task(path: Path) -> EvalTask:
    """Read a task file with its questions.

    Raises:
        DataError: the file, a question or an image header is faulty, or an answer does not fit the
            kind; names the file, the place and the way out.
    """
    try:
        settings = build(TaskFile, read_yaml(path))
    except OSError as error:
        raise DataError(f"task {path}: cannot be read: {error.strerror}") from error
    except UnreadableError as error:
        raise DataError(
            f"task {path}: {error}; a task has the keys task, kind ({', '.join(METRICS)}) and "
            "questions, and may have images, post_prompt and max_new_tokens"
        ) from error
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", settings.task):
        raise DataError(
            f"task {path}: task={settings.task!r:.40}: a name of letters, digits, _, . and - is "
            "needed; it names files and metrics"
        )
    if settings.max_new_tokens < 1:
        raise DataError(f"task {path}: max_new_tokens={settings.max_new_tokens}: must be positive")
    source = path.parent / settings.questions
    folder = None if settings.images is None else path.parent / settings.images
    try:
        questions = read_questions(source, folder)
        for question in questions:
            _check_references(settings.kind, question)
    except DataError as error:
        raise DataError(f"task {path}: {error}") from error
    ended = tuple(replace(q, text=q.text + settings.post_prompt) for q in questions)
    return EvalTask(
        name=settings.task,
        kind=settings.kind,
        questions=ended,
        max_new_tokens=settings.max_new_tokens,
    )


def read_tasks(paths: Sequence[Path]) -> list[EvalTask]:
    """Read several task files.

    Raises:
        DataError: see `read_task`; or two tasks have the same name.
    """
    tasks: dict[str, EvalTask] = {}
    for path in paths:
        task = read_task(path)
        if task.name in tasks:
            raise DataError(f"task {path}: another task is named {task.name} too; rename one")
        tasks[task.name] = task
    return list(tasks.values())


def _check_references(kind: Kind, question: Question) -> None:
    """Raise DataError if the true answers of a question do not fit the kind of task."""
    name, references = f"question {question.question_id}", question.references
    if not any(reference.strip() for reference in references):
        raise DataError(f'{name}: has no true answer; add "answer" or "answers"')
    if kind == "pope" and [r.lower().strip() for r in references] not in (["yes"], ["no"]):
        raise DataError(
            f"{name}: the answer to a pope question is yes or no, got {', '.join(references)!r:.60}"
            "; leave the question out, or choose kind exact_match"
        )
    if kind == "vqa" and len(references) <= VQA_ENOUGH:
        raise DataError(
            f"{name}: vqa compares with the answers of several people, at least "
            f'{VQA_ENOUGH + 1} in "answers" (VQAv2 has 10), got {len(references)}; add them, or '
            "choose kind exact_match"
        )


def measure(task: EvalTask, texts: Sequence[str]) -> list[CategoryResult]:
    """Compute the metrics of generated answers, given in the order of the questions.

    Returns:
        one result per type of question in alphabetical order, then one for all.
    """
    by_category: dict[str, list[Judged]] = {}
    for question, text in zip(task.questions, texts, strict=True):
        judged = Judged(text=text, references=question.references)
        by_category.setdefault(question.kind or UNTYPED, []).append(judged)
    rows = sorted(by_category.items())
    rows.append((ALL, [judged for _, some in rows for judged in some]))
    compute = METRICS[task.kind]
    return [
        CategoryResult(category=name, num_questions=len(some), metrics=compute(some))
        for name, some in rows
    ]


def as_table(task: EvalTask, results: Sequence[CategoryResult]) -> list[str]:
    """Format the results of one task as lines of a table for the terminal."""
    names = list(results[0].metrics)
    width = max(len(task.name), *(len(row.category) for row in results))
    lines = [f"{task.name:<{width}}  questions" + "".join(f"  {name:>9}" for name in names)]
    for row in results:
        values = (f"  {row.metrics[n]:>{max(9, len(n))}.1%}" for n in names)
        lines.append(f"{row.category:<{width}}  {row.num_questions:>9}" + "".join(values))
    return lines
