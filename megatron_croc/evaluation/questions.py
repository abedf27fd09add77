"""Questions for a model, from the command line, a questions file or LLaVA's training JSON.

    {"question_id": 7, "image": "a.jpg", "text": "What is this?"}                  a JSON line
    {"id": "a", "image": ["a.jpg", "b.jpg"], "conversations": [human, gpt, ...]}    LLaVA's record

A record of several rounds gives one question per round, with the previous rounds and their true
answers as history, as in training. "type" beside a text (or in the record) is the type of question,
"answers" several true answers: texts, or VQAv2's objects with the key "answer".
All faults are found before a model is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.sample.conversation import IMAGE_MARK, check_conversation
from megatron_croc.data.sample.image_header import ImageError, read_header
from megatron_croc.errors import DataError
from megatron_croc.file_reading import UnreadableError, parse_json


class ImageSource(Protocol):
    """An encoded image: the path of a file, or bytes in memory. `str` returns its name."""

    def read_bytes(self) -> bytes:
        """Return the encoded image."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageBytes:
    """An encoded image in memory; a Question holds it in place of a path."""

    name: str
    content: bytes

    def read_bytes(self) -> bytes:
        """Return the encoded image."""
        return self.content

    def __str__(self) -> str:
        """Return the name, for messages."""
        return self.name


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its images, history and true answer."""

    question_id: str | int
    text: str
    """Text with one IMAGE_MARK for each image that is new in this round."""

    images: tuple[ImageSource, ...] = ()
    """Images of the whole conversation, in the order of their marks."""

    history: tuple[tuple[str, str], ...] = ()
    """Previous questions and answers."""

    expected: str | None = None
    """True answer; None if the input has none."""

    references: tuple[str, ...] = ()
    """All true answers; `expected` alone if the input has no others."""

    kind: str | None = None
    """Type of the question; None if the input has none."""


def ask(text: str, images: list[Path], *, question_id: str | int = 0) -> Question:
    """Build a question about images; if the text has no marks, they are put before it.

    Raises:
        DataError: the numbers of marks and images differ, or an image cannot be read.
    """
    for image in images:
        _check_image(image, question_id)
    return _place(text, images, question_id)


def _place(text: str, images: list[Path], question_id: str | int) -> Question:
    marks = text.count(IMAGE_MARK)
    if marks == 0:
        text = f"{IMAGE_MARK}\n" * len(images) + text
    elif marks != len(images):
        raise DataError(
            f"question {question_id}: {marks} {IMAGE_MARK} mark(s) for {len(images)} image(s)"
        )
    return Question(question_id=question_id, text=text, images=tuple(images))


def read_questions(
    path: Path, image_folder: Path | None = None, *, opens_images: bool = True
) -> list[Question]:
    """Read a file of questions.

    Args:
        path: JSON lines of questions, or a JSON list of records.
        image_folder: folder of the images; None: folder of the file.
        opens_images: also read the header of every image.

    Raises:
        DataError: a line or record is faulty; names it and its fault.
    """
    folder = path.parent if image_folder is None else image_folder
    questions: list[Question] = []
    for place, record in _records(path):
        try:
            asked = list(_questions(record, folder, place))
            for image in dict.fromkeys(i for q in asked for i in q.images if opens_images):
                _check_image(image, asked[0].question_id)
            questions += asked
        except BadSampleError as error:
            raise DataError(f"{path}, {place}: {error.reason}") from error
        except DataError as error:
            raise DataError(f"{path}, {place}: {error}") from error
    if not questions:
        raise DataError(f"{path}: has no question")
    return questions


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a JSON list or of JSON lines."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"questions {path} cannot be read: {reason}") from error
    if content.lstrip().startswith("["):
        try:
            records = parse_json(content)
        except UnreadableError as error:
            raise DataError(f"{path}: {error}") from error
        yield from ((f"record {number}", record) for number, record in enumerate(records))
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", parse_json(line)
        except UnreadableError as error:
            raise DataError(f"{path}, line {number}: {error}") from error


def _questions(record: Any, folder: Path, place: str) -> Iterator[Question]:
    if not isinstance(record, dict):
        raise DataError(f"must be a JSON object, got {record!r:.60}")
    image = record.get("image") or []
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f'"image" must be a name or names, got {image!r:.60}')
    images = [folder / name for name in names]
    name = record.get("question_id", record.get("id"))
    name = name if isinstance(name, str | int) else place
    if "conversations" in record:
        yield from _rounds(record, images, name)
        return
    if not isinstance(record.get("text"), str) or not record["text"].strip():
        raise DataError('has neither "text" nor "conversations"')
    question = _place(record["text"], images, name)
    yield replace(question, **_known(record, _text_of(record, "answer")))


def _rounds(record: dict, images: list[Path], name: str | int) -> Iterator[Question]:
    """Yield one question per round, with the previous rounds."""
    messages = record["conversations"]
    check_conversation(messages, num_images=len(images), sample_id=str(name))
    shared = {name: record.get(name) for name in ("type", "answers")}
    if len(messages) > 2:
        shared.pop("answers")
    rounds = [
        (human["value"], gpt["value"], shared | human)
        for human, gpt in zip(messages[::2], messages[1::2], strict=True)
    ]
    seen = 0
    for number, (text, answer, about) in enumerate(rounds):
        seen += text.count(IMAGE_MARK)
        yield Question(
            question_id=f"{name}/{number}" if len(rounds) > 1 else name,
            text=text,
            images=tuple(images[:seen]),
            history=tuple((before, its_answer) for before, its_answer, _ in rounds[:number]),
            **_known(about, answer),
        )


def _known(record: dict, answer: str | None) -> dict[str, Any]:
    """True answers and type of a question, as fields of Question."""
    several = record.get("answers") or []
    texts = (
        [a.get("answer") if isinstance(a, dict) else a for a in several]
        if isinstance(several, list)
        else []
    )
    if not isinstance(several, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f'"answers" must be a list of texts, or of objects with "answer", got {several!r:.60}'
        )
    references = tuple(texts) or (() if answer is None else (answer,))
    return {
        "expected": references[0] if answer is None and references else answer,
        "references": references,
        "kind": _text_of(record, "type"),
    }


def _text_of(record: dict, name: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f'"{name}" must be a text, got {value!r:.60}')
    return value


def _check_image(image: ImageSource, name: str | int) -> None:
    try:
        read_header(image.read_bytes())
    except OSError as error:
        raise DataError(f"question {name}: image {image}: {error.strerror}") from error
    except ImageError as error:
        raise DataError(f"question {name}: image {image}: {error}") from error
