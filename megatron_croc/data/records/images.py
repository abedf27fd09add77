"""Images of a record: the field that holds them, their order, and the members of a tar.

"a.jpg" | bytes | {"bytes", "path"} | base64 | a list of these --values_of--> bytes and names
left_file_name, right_file_name | image_1, image_2 | one field --given_images--> one list
names in the record + members of the tar           --order_members--> members, in order
"""

import base64
import binascii
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from megatron_croc.data.bad_samples import BadKind
from megatron_croc.data.records.fields import (
    FILE_WORDS,
    holds_image,
    holds_image_name,
    is_empty,
    is_encoded_image,
    is_file_name_field,
    names_image,
    words_of,
)

ImageValue = str | bytes
"""A file name, or encoded bytes."""


class RecordFault(Exception):
    """Fault of a record whose name the caller knows."""

    def __init__(self, kind: BadKind, reason: str) -> None:
        """Args: kind: key of its count. reason: the fault and the way out."""
        super().__init__(reason)
        self.kind: BadKind = kind
        self.reason = reason


@dataclass(kw_only=True)
class GivenImages:
    """Images that the fields of a record give."""

    values: list[ImageValue]
    fields: list[str]
    """Fields that were read, and those that name the same files."""

    chosen_by_marks: bool = False
    """True: several unrelated fields; right only if the text has a mark for each image."""

    notes: dict[str, str] = field(default_factory=dict)
    """Decisions for the report, each with an example."""


def given_images(fields: Mapping[str, Any]) -> GivenImages:
    """Find the images among the fields of a record that hold no text.

    Raises:
        RecordFault: a field that names images holds something else.
    """
    found = {name: value for name, value in fields.items() if _is_image_field(name, value)}
    lists = {name: values_of(value, name) for name, value in found.items()}
    kept = _without_repeats(lists)
    names, notes = list(kept), {}
    related = len(names) < 2 or all(map(is_file_name_field, names))
    if not related and (numbers := _numbered(names)) is not None:
        names.sort(key=numbers.__getitem__)
        related = True
    if len(names) > 1:
        notes[f"images of a sample are read from {', '.join(names)}, in this order"] = ""
    return GivenImages(
        values=[value for name in names for value in kept[name]],
        fields=list(found),
        chosen_by_marks=not related,
        notes=notes,
    )


def values_of(value: object, name: str) -> list[ImageValue]:
    """Return the images of a field's value: nested lists are laid end to end.

    Raises:
        RecordFault: a value that is neither a file name nor an encoded image.
    """
    if isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            if is_empty(entry):
                raise RecordFault(
                    "missing_image",
                    f"entry {place} of {len(value)} in {name} is empty: name the image, or remove "
                    "the entry and its mark",
                )
        return [image for entry in value for image in values_of(entry, name)]
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with contextlib.suppress(ValueError, RecursionError):  # a list in a cell of a CSV
            return values_of(json.loads(value), name)
    if isinstance(value, str):
        return [_decoded(value, name) if is_encoded_image(value) else value]
    if isinstance(value, dict):
        content = value.get("bytes")
        if isinstance(content, str):
            return [_decoded(content, name)]
        for key in ("bytes", "path", "file_name", "url", "image", "data", "src"):
            if not is_empty(entry := value.get(key)):
                return values_of(entry, name)
    raise RecordFault(
        "record",
        f"{name} must hold file names, encoded images or {{bytes, path}}, got {value!r:.60}: "
        f"convert it, or leave it out with --ignore {name}",
    )


def order_members(members: Sequence[str], names: Sequence[str]) -> tuple[list[int], dict[str, str]]:
    """Order the image members of a tar's sample.

    Args:
        members: names of the members, in the order of the tar.
        names: names of the images in the record, in its order; may be empty.

    Returns:
        Number of each image's member, and the decisions for the report.

    Raises:
        RecordFault: record and tar do not hold the same images.
    """
    if names:
        aliases: dict[str, int] = {}
        for number, member in reversed(list(enumerate(members))):
            aliases |= dict.fromkeys(_aliases(member), number)
        found = [aliases.get(name, aliases.get(PurePosixPath(name).name)) for name in names]
        known = [number for number in found if number is not None]
        if len(known) == len(names):
            if unnamed := sorted(set(range(len(members))) - set(known)):
                raise RecordFault(
                    "image_marks",
                    f"the tar holds {members[unnamed[0]]!r:.80}, which the record does not name: "
                    "name it there, or leave it out with --ignore and its suffix",
                )
            return known, {"images in the order of the record": ""} if len(known) > 1 else {}
        if known or len(names) != len(members):
            missing = names[found.index(None)]
            raise RecordFault(
                "missing_image",
                f"the record names {len(names)} image(s), the tar holds {len(members)} "
                f"({', '.join(members)!s:.80}): {missing!r:.60} is not among them",
            )
        # Names of the original files, as many as members.
    order = list(range(len(members)))
    if len(members) < 2:
        return order, {}
    numbers = _numbered([PurePosixPath(member).name.partition(".")[2] for member in members])
    if numbers is not None:
        order.sort(key=list(numbers.values()).__getitem__)
        return order, {"images in the order of the numbers in their names": ""}
    return order, {"images in the order of the tar": ""}


def _is_image_field(name: str, value: object) -> bool:
    if names_image(name) or holds_image(value):
        return not isinstance(value, bool)
    return not FILE_WORDS.isdisjoint(words_of(name)) and holds_image_name(value)


def _without_repeats(lists: Mapping[str, list[ImageValue]]) -> dict[str, list[ImageValue]]:
    """Leave out fields that name the images of another field once more."""
    kept: dict[str, list[ImageValue]] = {}
    # Bytes first: a field of as many names then names the files that the bytes came from.
    for name, values in sorted(lists.items(), key=lambda item: not _is_bytes(item[1])):
        if any(_is_same(other, values) for other in kept.values()):
            continue
        kept[name] = values
    return {name: kept[name] for name in lists if name in kept}


def _is_bytes(values: list[ImageValue]) -> bool:
    return any(isinstance(value, bytes) for value in values)


def _is_same(images: list[ImageValue], others: list[ImageValue]) -> bool:
    if len(images) != len(others):
        return False
    if _is_bytes(images) and not _is_bytes(others):
        return True
    if _is_bytes(images) or _is_bytes(others):
        return images == others
    return [PurePosixPath(str(image)).name for image in images] == [
        PurePosixPath(str(image)).name for image in others
    ]


def _numbered(names: Sequence[str]) -> dict[str, int] | None:
    """Return the number in each name (left to its suffix) if nothing else tells them apart."""
    numbers: dict[str, int] = {}
    stems = set()
    for name in names:
        match = re.fullmatch(r"(.*?)(\d+)(\.[a-z0-9]+|_file_name)?", name, flags=re.IGNORECASE)
        if match is None:
            return None
        stems.add(match[1])
        numbers[name] = int(match[2])
    return numbers if len(stems) == 1 and len(set(numbers.values())) == len(names) else None


def _aliases(member: str) -> list[str]:
    """Return the names by which a record may call a member: whole, last part, suffix, stem."""
    last = PurePosixPath(member).name
    suffix = last.partition(".")[2]
    stems = [suffix.rpartition(".")[0], last.rpartition(".")[0], member.rpartition(".")[0]]
    return [name for name in (member, last, suffix, *stems) if name]


def _decoded(text: str, name: str) -> bytes:
    """Decode the base64 text of an image, with or without `data:image/..;base64,` before it."""
    head, comma, body = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if comma and "base64" not in head.lower():
        raise RecordFault("image", f"{name} is a data URI without base64: {head!r:.60}")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordFault("image", f"{name} is not valid base64: {error}") from error
