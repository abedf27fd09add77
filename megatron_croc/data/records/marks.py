"""Marks of images in texts: every published spelling becomes `<image>`.

"<image 1> or <image 2>"  numbered: the numbers choose the images (1 is the first)
"<|image|>", "<ImageHere>"  one mark for the next image
"<img>a.jpg</img>"          a mark and the name of its image
"""

import re
from collections.abc import Sequence
from typing import Any

from megatron_croc.data.records.images import RecordFault
from megatron_croc.data.sample.conversation import IMAGE_MARK

_NUMBERED = re.compile(r"<\|?image[ _-]?(\d{1,3})\|?>", re.IGNORECASE)
_NAMED = re.compile(r"<img>([^<>\n]+)</img>", re.IGNORECASE)
_PLAIN = re.compile(
    r"<\|image\|>|<\|image_pad\|>|(?i:<image_?(?:here|placeholder|soft_token|pad|token)>)|\[IMG\]"
    r"|<img></img>|<(?:Image|IMAGE)>"
)
_VIDEO = re.compile(r"^\s*<video>|<video>\s*$|<\|video_pad\|>")


def count_marks(messages: Sequence[dict[str, Any]]) -> int:
    """Count the `<image>` marks of the questions."""
    return sum(m["value"].count(IMAGE_MARK) for m in messages if m["from"] == "human")


def names_in_marks(messages: Sequence[dict[str, Any]]) -> list[str]:
    """Return the file names inside marks of the questions, in order."""
    asked = [message["value"] for message in messages if message["from"] == "human"]
    return [name for text in asked for name in _NAMED.findall(text)]


def unify_marks(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Replace marks in other spellings by `<image>`, unless there are such marks already.

    Returns:
        For numbered marks the number of each mark's image, from 0; else empty.
    """
    if any(IMAGE_MARK in message["value"] for message in messages):
        return []
    numbers: list[int] = []
    for message in messages:
        if message["from"] != "human":
            continue
        numbers += map(int, _NUMBERED.findall(message["value"]))
        text = _NUMBERED.sub(IMAGE_MARK, message["value"])
        message["value"] = _PLAIN.sub(IMAGE_MARK, _NAMED.sub(IMAGE_MARK, text))
    first = 0 if 0 in numbers else 1
    return [number - first for number in numbers]


def refuse_marks_without_image(messages: Sequence[dict[str, Any]]) -> None:
    """Refuse a text-only conversation that speaks of an image, and every one of a video.

    Raises:
        RecordFault: names the mark.
    """
    for number, message in enumerate(messages):
        for pattern in (_NUMBERED, _PLAIN):
            if match := pattern.search(message["value"]):
                raise RecordFault(
                    "image_marks",
                    f"message {number} has the mark {match[0]} and the record names no image: "
                    "name the image, or remove the mark",
                )


def refuse_other_media(messages: Sequence[dict[str, Any]]) -> None:
    """Refuse images inside a text, and videos.

    Raises:
        RecordFault: names the message.
    """
    for number, message in enumerate(messages):
        text = message["value"]
        if "data:image/" in text:
            raise RecordFault(
                "image",
                f"message {number} holds an image as a data URI inside its text: put it into a "
                f"field (image) and write {IMAGE_MARK} in its place",
            )
        if "video" in text and _VIDEO.search(text):
            raise RecordFault(
                "record", f"message {number} is about a video: videos are not read; remove it"
            )
