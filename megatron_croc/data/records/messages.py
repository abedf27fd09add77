"""Spellings of a conversation, and the messages in LLaVA's form.

conversations | messages | texts ..   a list of turns: {from, value}, {role, content}, {user,
                                      assistant}, [question, answer]; or a struct of such lists
question, answer | query, response | instruction, input, output ..     one question, one answer
caption | text | txt ..                                                a text of all its images
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_croc.data.records.fields import (
    holds_image,
    holds_image_name,
    is_empty,
    is_ignored,
    names_image,
    names_media,
)
from megatron_croc.data.records.images import ImageValue, RecordFault, values_of
from megatron_croc.data.sample.conversation import IMAGE_MARK

CONVERSATION_KEYS = (
    "conversations", "conversation", "messages", "texts", "dialogue", "dialog", "chat", "turns",
    "qa_pairs", "qa", "history",
)  # fmt: skip
"""Fields of a list of turns, in order of precedence."""

PAIR_KEYS = (
    ("question", "answer"), ("question", "multiple_choice_answer"), ("question", "answers"),
    ("instruction", "outputs"), ("inputs", "outputs"), ("inputs", "targets"),
    ("query", "response"), ("query", "answer"),
    ("question", "response"), ("instruction", "output"), ("instruction", "response"),
    ("instruction", "answer"), ("prompt", "response"), ("prompt", "completion"),
    ("input", "output"), ("user", "assistant"), ("human", "gpt"), ("human", "assistant"),
    ("problem", "solution"), ("q", "a"),
)  # fmt: skip
"""Fields of one question and its answer, in order of precedence."""

CAPTION_KEYS = (
    "caption", "text", "captions", "txt", "description", "alt_text", "alt", "texts", "blip_caption",
)  # fmt: skip
"""Fields of a caption, in order of precedence; those before `txt` also before a tar's .txt."""

_ASKED = frozenset(question for question, _ in PAIR_KEYS)
_ROLE_KEYS = ("from", "role", "speaker", "author")
_TEXT_KEYS = ("value", "content", "text", "message")
_MESSAGE_KEYS = frozenset(
    (*_ROLE_KEYS, *_TEXT_KEYS, *(key for pair in PAIR_KEYS for key in pair), "type", "weight")
)
_HUMAN = frozenset(["human", "user", "prompter", "question", "instruction", "customer", "q"])
_GPT = frozenset(
    ["gpt", "assistant", "model", "bot", "chatgpt", "bard", "bing", "chatbot", "answer", "ai", "a"]
)
_SYSTEM = frozenset(["system", "developer"])
_KNOWN_ROLES = {
    spelling: known
    for known, spellings in (("human", _HUMAN), ("gpt", _GPT), ("system", _SYSTEM))
    for spelling in spellings
}
_ROLES_KNOWN = "human or user, gpt or assistant, system"


@dataclass(kw_only=True)
class Turns:
    """Messages of a record."""

    messages: list[dict[str, Any]]
    """LLaVA's form, unchecked."""

    fields: list[str]
    """Fields that were read."""

    has_own_marks: bool
    """True for a form that says where its images stand; False: they stand before the text."""

    is_caption: bool = False
    images: list[ImageValue] = field(default_factory=list)
    """Images inside the messages."""

    indices: list[int] = field(default_factory=list)
    """Numbers of the record's images that the messages refer to, in order; may be empty."""

    notes: dict[str, str] = field(default_factory=dict)
    """Parts that were left out, and decisions, each with an example."""


def read_turns(fields: Mapping[str, Any]) -> Turns | None:
    """Find the text of a record; None: it has none.

    Args:
        fields: fields that hold something.

    Raises:
        RecordFault: a text in no known form; the reason says the way out.
    """
    lower = {name.lower(): name for name in reversed(list(fields))}
    for key in CONVERSATION_KEYS:
        if key in lower and (turns := _read_list(lower[key], fields[lower[key]])) is not None:
            return turns
    for question, answer in () if _ASKED.isdisjoint(lower) else PAIR_KEYS:
        if question in lower and answer in lower:
            return _read_pair(fields, lower, question, answer)
    for key in CAPTION_KEYS:
        if key in lower:
            name = lower[key]
            caption = _one_text(fields[name], name)
            return Turns(
                messages=[
                    {"from": "human", "value": ""},
                    {"from": "gpt", "value": caption.strip()},
                ],
                fields=[name],
                has_own_marks=False,
                is_caption=True,
            )
    return None


def _read_list(name: str, value: object) -> Turns | None:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RecordFault("record", f"{name} is a text that is not JSON: {error}") from error
    if isinstance(value, dict):
        value = _rows_of(value, name)
    if isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value))):
        return None  # `texts`, `chat` or `history` of plain texts: not turns
    if not isinstance(value, list):
        raise RecordFault(
            "record", f"{name} must be a list of messages, got {value!r:.60}: convert it"
        )
    turns = Turns(messages=[], fields=[name], has_own_marks=True)
    if (paired := _as_pairs(value)) is not None:
        turns.has_own_marks = False
        for number, (question, answer) in enumerate(paired):
            _read_more(turns, value[number], f"{name}, turn {number}")
            for role, text in (("human", question), ("gpt", answer)):
                content = _content(turns, text, f"{name}, turn {number}")
                turns.messages.append({"from": role, "value": content})
    else:
        for number, entry in enumerate(value):
            message = _usual_message(entry) or _as_message(turns, entry, f"message {number}")
            turns.messages.append(message)
    _leave_out_first(turns)
    return turns


def _rows_of(columns: dict[str, Any], name: str) -> object:
    """Turn a struct of lists into a list of structs (how `datasets` stores a Sequence of dict)."""
    filled = {key: value for key, value in columns.items() if not is_empty(value)}
    if filled and all(isinstance(value, list) for value in filled.values()):
        lengths = {len(value) for value in filled.values()}
        if len(lengths) == 1:
            return [
                dict(zip(filled, values, strict=True))
                for values in zip(*filled.values(), strict=True)
            ]
        raise RecordFault("record", f"{name} is a struct of lists of unequal lengths: {lengths}")
    return [columns]


def _as_pairs(entries: Sequence[object]) -> list[tuple[object, object]] | None:
    """Return questions and answers of turns that all hold both; None: they are messages."""
    pairs = []
    for entry in entries:
        if (pair := _as_pair(entry)) is None:
            return None
        pairs.append(pair)
    return pairs


def _as_pair(entry: object) -> tuple[object, object] | None:
    """Return question and answer of a turn that holds both; None: it is one message."""
    if isinstance(entry, list | tuple) and len(entry) == 2 and all(map(_is_text, entry)):
        return entry[0], entry[1]
    if not isinstance(entry, dict) or any(key in entry for key in _ROLE_KEYS):
        return None
    lower = {str(key).lower(): value for key, value in entry.items()}
    for question, answer in PAIR_KEYS:
        if question in lower and answer in lower:
            return lower[question], lower[answer]
    return None


def _usual_message(entry: object) -> dict[str, Any] | None:
    """Return a message in the usual spellings, at a tenth of the cost; None: it is in another."""
    if not isinstance(entry, dict) or len(entry) != 2:
        return None
    keys = ("from", "value") if "from" in entry else ("role", "content")
    role, text = map(entry.get, keys)
    known = _KNOWN_ROLES.get(role) if isinstance(role, str) else None
    return {"from": known, "value": text} if known and isinstance(text, str) else None


def _as_message(turns: Turns, entry: object, name: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RecordFault(
            "record", f"{name} must be a JSON object with role and text, got {entry!r:.60}"
        )
    role_key = next((key for key in _ROLE_KEYS if not is_empty(entry.get(key))), None)
    text_keys = [key for key in _TEXT_KEYS if key in entry]
    if role_key is None and len(entry) == 1:  # {"user": ".."}, {"assistant": ".."}
        ((role, content),) = entry.items()
    else:
        role = entry.get(role_key) if role_key else None
        filled = [key for key in text_keys if not is_empty(entry[key])]
        key = next(iter(filled or text_keys), None)
        if role is None or key is None:
            raise RecordFault(
                "record",
                f'{name} must have the texts "from" and "value" (or "role" and "content"), got '
                f"{entry!r:.80}",
            )
        content = entry[key]
    _read_more(turns, entry, name)
    return {"from": _role(role, name), "value": _content(turns, content, name)}


def _read_more(turns: Turns, entry: object, name: str) -> None:
    """Read the images that stand in a message beside its text; tell of other keys."""
    for key, value in entry.items() if isinstance(entry, dict) else ():
        if is_empty(value) or str(key).lower() in _MESSAGE_KEYS or is_ignored(str(key)):
            continue
        if names_media(key, value):
            raise RecordFault("record", f"{name}: {key} is a video or a sound, which is not read")
        if names_image(key) or holds_image(value) or holds_image_name(value):
            turns.images += values_of(value, f"{name}, {key}")
        else:
            turns.notes.setdefault(f"{key} of messages is not read", f"{value!r:.60}")


def _role(role: object, name: str) -> str:
    known = _KNOWN_ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is not None:
        return known
    raise RecordFault(
        "roles", f"{name} is from {role!r:.40}; roles are {_ROLES_KNOWN}: rename or remove it"
    )


def _content(turns: Turns, content: object, name: str) -> str:
    """Return a message's text; parts of images become marks."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and "type" in content:
        content = [content]
    if isinstance(content, dict):
        content = _rows_of(content, name)
    if isinstance(content, list) and not is_empty(content):
        return "\n".join(text for part in content if (text := _part(turns, part, name)))
    state = "is empty" if is_empty(content) else f"is {content!r:.40}, no text"
    raise RecordFault(
        "record", f"{name}: its value {state}: write the text in quotes, or remove the record"
    )


def _part(turns: Turns, part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RecordFault("record", f"{name} has a part that is no text: {part!r:.40}")
    filled = {key: value for key, value in part.items() if not is_empty(value)}
    kind = str(filled.get("type", "image" if "image" in filled else "text")).lower()
    if "image" in kind:
        for key in ("image", "image_url", "url", "path", "source", "data", "bytes"):
            if key in filled:
                turns.images += values_of(filled[key], f"{name}, {key}")
                return IMAGE_MARK
        if isinstance(index := filled.get("index"), int | float):
            turns.indices.append(int(index))
        return IMAGE_MARK
    if "text" in kind:
        text = next((part[key] for key in ("text", "content", "value") if key in part), None)
        if isinstance(text, str):
            return text
        raise RecordFault(
            "record", f"{name} has a part without a text: {part!r:.60}; write the text itself"
        )
    raise RecordFault(
        "record", f"{name} has a part of type {kind!r:.20}: only text and images are read"
    )


def _leave_out_first(turns: Turns) -> None:
    """Leave out system turns, then a first answer without a question, as the released code does."""
    kept = []
    for message in turns.messages:
        if message["from"] == "system":
            note = "system turn left out: the template has its own"
            turns.notes.setdefault(note, f"{message['value']!r:.60}")
        else:
            kept.append(message)
    if len(kept) > 2 and kept[0]["from"] == "gpt":
        note = "first answer left out: no question stands before it"
        turns.notes.setdefault(note, f"{kept.pop(0)['value']!r:.60}")
    turns.messages = kept


def _read_pair(
    fields: Mapping[str, Any], lower: Mapping[str, str], question: str, answer: str
) -> Turns:
    """Read a question and its answer; the `input` of an instruction follows it on its own line."""
    read = [lower[question], lower[answer]]
    turns = Turns(messages=[], fields=read, has_own_marks=False)
    asked = _content(turns, fields[read[0]], read[0])
    for more in ("input", "inputs") if question == "instruction" else ():
        if more in lower:
            turns.fields.append(lower[more])
            asked = f"{asked}\n{_content(turns, fields[lower[more]], lower[more])}"
    said = _one_text(fields[read[1]], read[1])
    turns.messages = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    return turns


def _one_text(value: object, name: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(map(_is_text, value)):
        raise RecordFault(
            "record", f"{name} holds {len(value)} texts, a sample has one: make one record of each"
        )
    raise RecordFault("record", f"{name} must be a text, got {value!r:.60}: write the text itself")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def put_marks_first(messages: Sequence[dict[str, Any]], num_images: int) -> None:
    """Put a mark for each image before the first question, each on its own line."""
    marks = "\n".join([IMAGE_MARK] * num_images)
    first = messages[0]["value"]
    messages[0]["value"] = f"{marks}\n{first}" if marks and first else marks or first
