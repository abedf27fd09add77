"""Files of traces: JSON lines.

line 1      the header: rank, world size, sizes of the axes, groups, which ranks it stands for
line 2..    one event a line: {"event": "compute", ...}; default values are left out
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from megatron_croc.errors import DataError
from megatron_croc.file_reading import UnreadableError, read_json_lines
from megatron_croc.rehearsal.trace import (
    AXES,
    EVENTS,
    FORMAT,
    Event,
    Exchange,
    Group,
    Header,
    Trace,
    Transfer,
)


def write_trace(path: str | Path, header: Header, events: Iterable[Event]) -> None:
    """Write a trace as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"event": "header", **dataclasses.asdict(header)}) + "\n")
        for event in events:
            file.write(json.dumps({"event": event.event, **_given(event)}) + "\n")


def _given(event: Event) -> dict[str, Any]:
    """Fields that differ from their default."""
    values = {}
    for entry in fields(event):
        value = getattr(event, entry.name)
        if value != entry.default:
            values[entry.name] = value
    if isinstance(event, Exchange):
        values["transfers"] = [dataclasses.asdict(transfer) for transfer in event.transfers]
    return values


def read_trace(path: str | Path) -> Trace:
    """Read a trace that `write_trace` wrote.

    Raises:
        DataError: the file cannot be read, or line N of it is no event of this format.
    """
    header: Header | None = None
    events: list[Event] = []
    try:
        for number, row in read_json_lines(path):
            try:
                if header is None:
                    header = _header(row)
                else:
                    events.append(_event(row))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}, line {number}: not a line of a trace ({error}); record it again"
                ) from error
    except (OSError, UnreadableError) as error:
        raise DataError(f"{path}: the trace cannot be read: {error}") from error
    if header is None:
        raise DataError(f"{path}: an empty trace; record it again")
    return Trace(header, tuple(events))


def _header(row: dict[str, Any] | None) -> Header:
    values = _checked_row(row)
    if values.pop("event") != "header" or values.get("format") != FORMAT:
        raise ValueError(f"a header of format {FORMAT} is needed")
    groups = tuple(_build(Group, {**g, "ranks": tuple(g["ranks"])}) for g in values.pop("groups"))
    values["stands_for"] = tuple(values["stands_for"])
    header: Header = _build(Header, {**values, "groups": groups})
    product = 1
    for axis in AXES:
        product *= header.sizes[axis]
    if product != header.world_size:
        raise ValueError(f"axes of {dict(header.sizes)} are not {header.world_size} ranks")
    return header


def _event(row: dict[str, Any] | None) -> Event:
    values = _checked_row(row)
    kind = EVENTS.get(values.pop("event"))
    if kind is None:
        raise ValueError("unknown event")
    if kind is Exchange:
        values["transfers"] = tuple(_build(Transfer, t) for t in values["transfers"])
    return _build(kind, values)


def _checked_row(row: dict[str, Any] | None) -> dict[str, Any]:
    if row is None:
        raise ValueError("not a JSON object")
    return dict(row)


_TYPES: dict[type[Any], dict[str, tuple[type, ...]]] = {}


def _build(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Make an instance; values must be of the fields' plain types."""
    if kind not in _TYPES:
        _TYPES[kind] = {
            name: _plain(hint)
            for name, hint in typing.get_type_hints(kind).items()
            if typing.get_origin(hint) is not ClassVar and hint is not ClassVar
        }
    for name, value in values.items():
        if name not in _TYPES[kind]:
            raise ValueError(f"unknown field {name}")
        if not isinstance(value, _TYPES[kind][name]) or (
            isinstance(value, bool) and bool not in _TYPES[kind][name]
        ):
            raise ValueError(f"{name}: {value!r} is of another type")
    return kind(**values)


def _plain(hint: Any) -> tuple[type, ...]:
    """Types that isinstance understands."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for option in typing.get_args(hint) for kind in _plain(option))
    if origin is typing.Literal:
        return (str,)
    if origin is not None:
        return (dict,) if origin is not tuple else (tuple,)
    return (int, float) if hint is float else (hint,)
