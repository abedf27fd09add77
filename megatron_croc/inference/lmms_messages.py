"""Requests of lmms-eval as questions: chat messages to text with marks, settings to Sampling.

Parts of a message become the text of training by the rules of the export's chat template
(convert/chat_templates.py).
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_croc.data.sample.conversation import IMAGE_MARK
from megatron_croc.errors import ConfigError, DataError
from megatron_croc.evaluation.questions import ImageBytes, ImageSource, Question
from megatron_croc.inference.generation import Sampling

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """Convert generation_kwargs of a task.

    Raises:
        ConfigError: beam search is asked for.
    """
    if (settings.get("num_beams") or 1) > 1:
        raise ConfigError("generation_kwargs: num_beams must be 1; croc has no beam search")
    length = settings.get("max_new_tokens") or Sampling.max_new_tokens
    temperature = settings.get("temperature") or 0.0
    if not settings.get("do_sample", True) or temperature == 0:
        return Sampling(max_new_tokens=length)
    top_p, top_k = settings.get("top_p") or 1.0, settings.get("top_k") or 0
    return Sampling(max_new_tokens=length, temperature=temperature, top_p=top_p, top_k=top_k)


def question_of(messages: Sequence[Mapping[str, Any]], *, question_id: int | str) -> Question:
    """Convert chat messages, the last from the user, to a question with history.

    Raises:
        DataError: roles in another order, a part that is no text or image, or marks in a text that
            are not as many as the images.
    """
    texts: list[str] = []
    images: list[ImageSource] = []
    for number, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise DataError(
                f"question {question_id}: message {number} is from {message['role']}; user and "
                "assistant must alternate, user first (a system message is training's)"
            )
        text, new = _value(message["content"], question_id)
        texts.append(text)
        images += new
    if len(texts) % 2 == 0:
        raise DataError(f"question {question_id}: the last message is not from the user")
    return Question(
        question_id=question_id,
        text=texts[-1],
        images=tuple(images),
        history=tuple(zip(texts[:-1:2], texts[1::2], strict=True)),
    )


def _value(
    content: Sequence[Mapping[str, Any]], question_id: int | str
) -> tuple[str, list[ImageSource]]:
    """Text with marks and the images of one message."""
    parts = [part for part in content if part["type"] != "text" or part["text"]]
    kinds = [part["type"] for part in parts]
    if others := set(kinds) - {"text", "image"}:
        raise DataError(f"question {question_id}: a part of type {others.pop()}; images are read")
    images = [_source(part["url"]) for part in parts if part["type"] == "image"]
    words = "".join(part["text"] for part in parts if part["type"] == "text")
    if (marks := words.count(IMAGE_MARK)) and marks != len(images):
        raise DataError(
            f"question {question_id}: its text has {marks} {IMAGE_MARK} mark(s) for "
            f"{len(images)} image(s)"
        )
    if marks or not images:
        return words, images
    is_among = any(
        kind == "image" and "text" in kinds[:place] and "text" in kinds[place:]
        for place, kind in enumerate(kinds)
    )
    if len(images) == 1 or not is_among:
        return (f"{IMAGE_MARK}\n" * len(images) + words.strip()).strip(), images
    return _inline(parts), images


def _inline(parts: Sequence[Mapping[str, Any]]) -> str:
    """Text with a mark at the place of each image; a line break follows those at the beginning."""
    text, has_words = "", False
    for part, following in zip(parts, [*parts[1:], {}], strict=True):
        if part["type"] == "text":
            text, has_words = text + part["text"], True
        else:
            is_spaced = following.get("text", "")[:1] in (" ", "\n", "\t")
            text += IMAGE_MARK + ("" if has_words or is_spaced else "\n")
    return text


def _source(image: Any) -> ImageSource:
    """Image as encoded bytes: of its file, or as PNG, which loses nothing."""
    if isinstance(image, str | Path):
        return Path(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"an image is a {type(image).__name__}, not a path or a PIL image")
    stream = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(stream, "PNG")
    return ImageBytes(name="of the task", content=stream.getvalue())
