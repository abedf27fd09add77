"""Reading of one record: its messages, its images in order, and what was not read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.records.fields import (
    ARRAY_SUFFIXES,
    IMAGE_WORDS,
    MEDIA_SUFFIXES,
    FieldRules,
    holds_image_name,
    is_about_caption,
    is_empty,
    is_ignored,
    names_image,
    names_media,
    speaks_of_image,
    suffix_of,
    words_of,
)
from megatron_croc.data.records.images import (
    ImageValue,
    RecordFault,
    given_images,
    order_members,
)
from megatron_croc.data.records.marks import (
    count_marks,
    names_in_marks,
    refuse_marks_without_image,
    refuse_other_media,
    unify_marks,
)
from megatron_croc.data.records.messages import (
    CAPTION_KEYS,
    CONVERSATION_KEYS,
    PAIR_KEYS,
    Turns,
    put_marks_first,
    read_turns,
)
from megatron_croc.data.sample.conversation import IMAGE_MARK, check_conversation

TextFormat = Literal["json", "txt", "mixed"]
"""Format of the texts of a tar: all JSON, all plain captions, or sample by sample."""

NO_RULES = FieldRules()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One record that can be trained on."""

    messages: list[dict[str, str]]
    """LLaVA's form, checked."""

    images: list[ImageValue | int]
    """File name, encoded bytes, or number of the tar's member, in the order of the marks."""

    notes: dict[str, str] = field(default_factory=dict)
    """Parts that were not read, and decisions, each with an example."""


def parse_text(text: bytes, text_format: TextFormat) -> dict[str, Any]:
    """Parse the record in a sample's text member; a byte order mark is no part of it.

    Raises:
        ValueError: not UTF-8, not a JSON object, or nested too deeply.
    """
    try:
        if text_format == "mixed":
            text_format = "json" if is_json_object(text) else "txt"
        if text_format == "txt":
            return {"caption": text.decode("utf-8-sig")}
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


def is_json_object(text: bytes) -> bool:
    """Return True for a text that a tar of mixed texts takes for JSON, not for a caption."""
    try:
        return text.lstrip()[:1] in (b"{", b"\xef") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_record(
    record: Mapping[str, Any],
    sample_id: str,
    *,
    members: Sequence[str] = (),
    other_members: Sequence[str] = (),
    rules: FieldRules = NO_RULES,
) -> Reading:
    """Read a record.

    Args:
        record: fields of any input.
        sample_id: name used in errors.
        members: names of the image members of a tar's sample, in the order of the tar.
        other_members: names of its other members, less the texts.
        rules: fields that the user renames or ignores.

    Raises:
        BadSampleError: no text, a text that cannot be trained on, or an image that is not read.
    """
    try:
        reading = _read(rules.apply(record), record, members, other_members)
    except RecordFault as fault:
        raise BadSampleError(sample_id, fault.kind, fault.reason) from fault
    except RecursionError as error:
        raise BadSampleError(sample_id, "record", "nested too deeply") from error
    check_conversation(reading.messages, num_images=len(reading.images), sample_id=sample_id)
    return reading


def conversation_of(record: dict[str, Any], num_images: int, sample_id: str) -> object:
    """Return the messages of a stored record in LLaVA's form, unchecked.

    Args:
        record: record of a shard or of an indexed tar, whose images are its other members.
        num_images: number of images of the sample; a caption gets one mark for each.
        sample_id: name used in errors.

    Raises:
        BadSampleError: the record has no text in a known form.
    """
    try:
        turns = _turns_of(NO_RULES.apply(record), record)
    except RecordFault as fault:
        raise BadSampleError(sample_id, fault.kind, fault.reason) from fault
    _place_marks(turns, num_images)
    return turns.messages


def texts_of(record: object) -> list[str]:
    """Return questions, answers or caption of a record, without image marks; may be empty."""
    if not isinstance(record, dict):
        return []
    try:
        turns = _turns_of(NO_RULES.apply(record), record)
    except RecordFault:
        return []
    texts = (message["value"].replace(IMAGE_MARK, "").strip() for message in turns.messages)
    return [text for text in texts if text]


def join_texts(json_text: bytes | None, txt: bytes | None) -> tuple[dict[str, Any], bool]:
    """Return the record of a tar's sample, and True if its .txt holds the text.

    A .json without a text of its own is metadata of the caption in the .txt beside it.

    Raises:
        ValueError: as parse_text.
    """
    record = {} if json_text is None else parse_text(json_text, "json")
    if txt is None:
        return record, False
    caption = parse_text(txt, "txt")["caption"]
    weak = CAPTION_KEYS[CAPTION_KEYS.index("txt") :]
    try:
        turns = read_turns({k: v for k, v in NO_RULES.apply(record).items() if k not in weak})
    except RecordFault:
        return record, False  # refused later, with this fault
    if turns is None:
        return {**record, "caption": caption}, True
    is_same = turns.is_caption and turns.messages[1]["value"] == caption.strip()
    return record if is_same else {**record, "txt": caption}, False


def _turns_of(fields: Mapping[str, Any], record: Mapping[str, Any]) -> Turns:
    if (turns := read_turns(fields)) is not None:
        return turns
    known = {*CAPTION_KEYS, *CONVERSATION_KEYS, *(key for pair in PAIR_KEYS for key in pair)}
    if empty := [key for key, value in record.items() if key.lower() in known and value == ""]:
        raise RecordFault("no_answer", f"{empty[0]} is empty: write its text")
    there = ", ".join(fields) or "nothing"
    raise RecordFault(
        "missing_caption",
        "has none of conversations, messages, caption, text, or question and answer; it has "
        f"{there:.120}: name the field of the text with --rename FIELD=caption",
    )


def _place_marks(turns: Turns, num_images: int) -> list[int]:
    """Give the questions their marks; return the numbers of numbered marks."""
    numbers = unify_marks(turns.messages) if num_images else []
    if not turns.has_own_marks and turns.messages and not count_marks(turns.messages):
        put_marks_first(turns.messages, num_images)
    return numbers


def _read(
    fields: dict[str, Any],
    record: Mapping[str, Any],
    members: Sequence[str],
    other_members: Sequence[str],
) -> Reading:
    turns = _turns_of(fields, record)
    rest = {name: value for name, value in fields.items() if name not in turns.fields}
    given = given_images(rest)
    notes = turns.notes | given.notes
    values = _chosen(given.values, [*turns.images, *names_in_marks(turns.messages)], given.fields)
    images: list[ImageValue | int] = [*values]
    if members:
        names = [value for value in values if isinstance(value, str)]
        if len(names) != len(values):
            raise RecordFault(
                "image_marks",
                f"images stand both in the record ({', '.join(given.fields)}) and beside it "
                f"({', '.join(members)!s:.80}): leave out one of them with --ignore",
            )
        order, decided = order_members(members, names)
        images = [*order]
        notes |= decided
    refuse_other_media(turns.messages)
    numbers = _place_marks(turns, len(images)) or turns.indices
    images = _by_number(images, numbers)
    if given.chosen_by_marks and (
        not turns.has_own_marks or count_marks(turns.messages) != len(images)
    ):
        raise RecordFault(
            "image_marks",
            f"images stand in several fields ({', '.join(given.fields)}): leave out those that "
            "are not meant with --ignore, or number them with --rename FIELD=image_1",
        )
    unread = {name: value for name, value in rest.items() if name not in given.fields}
    names = [value for value in values if isinstance(value, str)]
    _refuse_unread(unread, images, names, is_caption=turns.is_caption)
    _refuse_members(other_members, has_images=bool(images))
    if not images:
        refuse_marks_without_image(turns.messages)
        for name in record:
            if name not in fields and names_image(name) and is_empty(record[name]):
                notes.setdefault(f"{name} is empty: a sample of text only", "")
    for name, value in unread.items():
        if not is_ignored(name):
            notes.setdefault(f"field {name} is not read", f"{value!r:.60}")
    for name in other_members:
        suffix = PurePosixPath(name).name.partition(".")[2]
        if not is_ignored(suffix):
            notes.setdefault(f"member .{suffix} is not read", name)
    return Reading(messages=turns.messages, images=images, notes=notes)


def _chosen(
    given: list[ImageValue], inside: list[ImageValue | str], fields: list[str]
) -> list[ImageValue]:
    """Choose between the images of the fields and those inside the messages: once each."""
    if not given or not inside:
        return given or inside
    if len(given) != len(inside):
        raise RecordFault(
            "image_marks",
            f"{len(inside)} image(s) stand inside the messages, {len(given)} in "
            f"{', '.join(fields)}: leave out one of them",
        )
    return given


def _by_number(images: list[ImageValue | int], numbers: list[int]) -> list[ImageValue | int]:
    """Order the images by the numbers of their marks; without numbers as they are."""
    if not numbers or not images:
        return images
    if set(numbers) != set(range(len(images))):
        raise RecordFault(
            "image_marks",
            f"the marks have the numbers {sorted({n + 1 for n in numbers})}, the record has "
            f"{len(images)} image(s): give each image a mark",
        )
    return [images[number] for number in numbers]


def _refuse_unread(
    unread: Mapping[str, Any], images: Sequence[object], names: Sequence[str], *, is_caption: bool
) -> None:
    """Refuse a record whose unread fields hold a video, or an image that is not read.

    The web address, width or height beside a caption is that of its image.
    """
    for name, value in unread.items():
        if names_media(name, value):
            raise RecordFault(
                "record",
                f"{name} is a video or a sound ({value!r:.40}), which is not read: remove the "
                f"record, or leave the field out with --ignore {name}",
            )
        if images:
            if is_ignored(name) or not holds_image_name(value) or not names:
                continue
            known = {PurePosixPath(one).name for one in names}
            if isinstance(value, str) and PurePosixPath(value).name in known:
                continue
            reason = "names an image that is not read"
        elif speaks_of_image(name, value) or (is_caption and is_about_caption(name, value)):
            reason = "speaks of an image, and the record gives none"
            if isinstance(value, str) and "://" in value:
                reason += " (web addresses are not fetched)"
        else:
            continue
        raise RecordFault(
            "missing_image",
            f"{name} {reason}: {value!r:.60}; if it names the image, say --rename {name}=image, "
            f"if it does not matter, --ignore {name}",
        )


def _refuse_members(other_members: Sequence[str], *, has_images: bool) -> None:
    for name in other_members:
        suffix = PurePosixPath(name).name.partition(".")[2]
        last = suffix_of(name)
        if last in MEDIA_SUFFIXES:
            raise RecordFault(
                "record", f"{name!r:.80} is a video or a sound, which is not read: remove it"
            )
        pixels = not IMAGE_WORDS.isdisjoint(words_of(suffix))
        if pixels or (last in ARRAY_SUFFIXES and not has_images):
            raise RecordFault(
                "missing_image",
                f"{name!r:.80} may hold an image and is not read: store it as .jpg or .png",
            )
