"""Forms of a record, the same for every input, and the conversation in it.

{"conversations": [{"from": "human", "value": ..}, ..]}     LLaVA
{"messages": [{"role": "user", "content": ..}, ..]}         chat style, content plain text
{"caption": ".."}  {"text": ".."}  a .txt file              a caption of all its images
"""

import json
from typing import Any

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.sample.conversation import IMAGE_MARK
from megatron_croc.data.store.shard_writer import TextFormat

CAPTION_KEYS = ("caption", "text")
"""Keys of a caption, in order of precedence."""

_ROLES = {"user": "human", "assistant": "gpt"}


def parse_text(text: bytes, text_format: TextFormat) -> dict[str, Any]:
    """Parse the record in a sample's text member.

    Raises:
        ValueError: not UTF-8, not a JSON object, or nested too deeply.
    """
    try:
        if text_format == "txt":
            return {"caption": text.decode()}
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {type(record).__name__}")
    return record


def conversation_of(record: dict[str, Any], num_images: int, sample_id: str) -> object:
    """Return a record's messages in LLaVA's form, unchecked.

    Args:
        record: one of the forms above.
        num_images: number of images of the sample; a caption gets one mark for each.
        sample_id: name used in errors.

    Raises:
        BadSampleError: the record has neither a conversation nor a caption.
    """
    if "conversations" in record:
        return record["conversations"]
    if isinstance(messages := record.get("messages"), list):
        return [_as_llava(message) for message in messages]
    for key in CAPTION_KEYS:
        if isinstance(caption := record.get(key), str):
            question = "\n".join([IMAGE_MARK] * num_images)
            return [{"from": "human", "value": question}, {"from": "gpt", "value": caption.strip()}]
    raise BadSampleError(
        sample_id,
        "missing_caption",
        f"has none of conversations, messages, {', '.join(CAPTION_KEYS)}",
    )


def texts_of(record: object) -> list[str]:
    """Return questions, answers or caption of a record, without image marks; may be empty."""
    if not isinstance(record, dict):
        return []
    try:
        messages = conversation_of(record, 0, "")
    except BadSampleError:
        return []
    if not isinstance(messages, list):
        return []
    values = (message.get("value") for message in messages if isinstance(message, dict))
    texts = (value.replace(IMAGE_MARK, "").strip() for value in values if isinstance(value, str))
    return [text for text in texts if text]


def _as_llava(message: object) -> object:
    if not isinstance(message, dict):
        return message
    role = message.get("role")
    return {"from": _ROLES.get(role, role) if isinstance(role, str) else role} | {
        "value": message.get("content")
    }
