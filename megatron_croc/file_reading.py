"""Reading of small files from disk that anyone may have written: limits first, then content.

    JSON, JSON lines    size, depth, kinds of values
    YAML                size, depth, repeated keys, and the size when aliases are written out

Headers of safetensors and .npy files are in tensor_headers.py, of tars in data/prepare. A file
beyond a limit, or of another form, raises UnreadableError with one short line; the caller adds the
file's name and the way out. Nothing here runs code from a file.
"""

import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import yaml

from megatron_croc.errors import CrocError, first_line

MAX_BYTES = 64 << 20
"""Most bytes of a file that is read whole."""

MAX_YAML_BYTES, MAX_YAML_NODES = 256 << 10, 20_000
"""Most bytes of a YAML file, and most values of it when every alias is written out."""

MAX_DEPTH = 64
"""Most levels of lists and mappings in each other."""

T = TypeVar("T")


class UnreadableError(CrocError):
    """A file is too large, too deep, or not of the form that is read."""


def read_limited(path: str | Path, *, most: int = MAX_BYTES) -> bytes:
    """Read a whole regular file.

    Raises:
        OSError: it cannot be read.
        UnreadableError: it is larger than `most` bytes, or a pipe or device.
    """
    if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
        raise UnreadableError("a pipe or device, not a file")
    with open(path, "rb") as file:
        return _limited(file, most)


def _limited(file: BinaryIO, most: int) -> bytes:
    content = file.read(most + 1)
    if len(content) > most:
        raise UnreadableError(f"larger than {most:,} bytes")
    return content


def parse_json(text: str | bytes, *, most_depth: int = MAX_DEPTH) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        UnreadableError: not UTF-8, not valid JSON, or nested more than `most_depth` levels.
    """
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise UnreadableError(f"nested more than {most_depth} levels") from error
    except UnicodeDecodeError as error:
        raise UnreadableError("not UTF-8") from error
    except ValueError as error:
        raise UnreadableError(f"not valid JSON: {first_line(error)}") from error
    if _is_deeper(tree, most_depth):
        raise UnreadableError(f"nested more than {most_depth} levels")
    return tree


def _is_deeper(tree: object, most: int) -> bool:
    """Return True if lists and mappings are nested more than `most` levels."""
    level = [tree]
    for _ in range(most + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in cast(
                "list[object]", list(parent.values()) if isinstance(parent, dict) else parent
            )
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def read_json(path: str | Path, *, most: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises OSError, UnreadableError."""
    tree = parse_json(read_limited(path, most=most))
    if not isinstance(tree, dict):
        raise UnreadableError(f"a JSON object is needed, not a {type(tree).__name__}")
    return cast(dict[str, Any], tree)


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (number, object) of every line; None for a line that is no JSON object.

    Bytes that are not UTF-8 make their line unreadable, and no other.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = parse_json(line)
            except UnreadableError:
                row = None
            yield number, row if isinstance(row, dict) else None


def whole_number(text: str) -> int | None:
    """Return the number that a text of at most 18 ASCII digits stands for, else None."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def is_number(value: object) -> bool:
    """Return True for a finite int or float; True and False are none."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 2**1023
        and math.isfinite(value)
    )


# ---------------------------------------------------------------------------------------------
# Kinds of values


def build(cls: type[T], tree: object, *, names: dict[str, type] | None = None) -> T:
    """Build a dataclass from a JSON object, with every value of the kind that its field names.

    Counts (int) are whole numbers from 0 to 2^63 - 1. Lists become tuples where the field is one.

    Args:
        cls: the dataclass.
        tree: the object.
        names: classes that the module of `cls` names but does not import.

    Raises:
        UnreadableError: a key is missing or unknown, or a value is of another kind.
    """
    if not isinstance(tree, dict):
        raise UnreadableError(f"an object is needed, not {tree!r:.40}")
    tree = cast(dict[str, Any], tree)
    kinds = typing.get_type_hints(cls, localns=names)
    known = {field.name: field for field in fields(cast(Any, cls)) if field.init}
    if unknown := [name for name in tree if name not in known]:
        raise UnreadableError(f"unknown key {unknown[0]!r:.40}")
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values[name] = _converted(value, kinds[name], name)
    try:
        return cls(**values)
    except TypeError as error:
        raise UnreadableError(f"a key is missing: {first_line(error)}") from error


def _converted(value: Any, kind: Any, name: str) -> Any:
    """Convert a value of JSON to a kind; raise UnreadableError if it is of another."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return _converted(value, option, name)
            except UnreadableError:
                continue
    elif kind is type(None):
        if value is None:
            return None
    elif origin is Literal:
        if value in inner:
            return value
    elif origin in (list, tuple) and isinstance(value, list):
        return origin(_converted(item, inner[0], name) for item in value)
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _converted(item, inner[1], name) for key, item in value.items()}
    elif isinstance(kind, type) and is_dataclass(kind):
        return build(kind, value)
    elif kind is float and is_number(value):
        return float(value)
    elif kind is int and type(value) is int:
        if 0 <= value < 2**63:
            return value
    elif kind in (str, bool) and type(value) is kind:
        return value
    raise UnreadableError(f"{name} must be {_described(kind)}, not {value!r:.40}")


def _described(kind: Any) -> str:
    return {int: "a count", float: "a number", str: "a text", bool: "true or false"}.get(
        kind, str(kind).replace("typing.", "").rpartition(".")[2]
    )


# ---------------------------------------------------------------------------------------------
# YAML


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses repeated keys and reads 2e-5 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise UnreadableError for a repeated key (PyYAML keeps the last)."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    line = key_node.start_mark.line + 1
                    raise UnreadableError(f"line {line}: {key_node.value:.60} is given twice")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# In YAML 1.1, 2e-5 is a string because it has no dot.
_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file; None if it is empty. A pipe is allowed.

    Raises:
        OSError: it cannot be read.
        UnreadableError: too large, too deep, not YAML, a repeated key, or aliases that grow beyond
            MAX_YAML_NODES values.
    """
    with open(path, "rb") as file:
        content = _limited(file, MAX_YAML_BYTES)
    try:
        text = content.decode()
        _check_events(text)
        loader = _Loader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}, set()) > MAX_YAML_NODES:
            raise UnreadableError(f"its aliases grow to more than {MAX_YAML_NODES:,} values")
        return cast(object, loader.construct_document(node))
    except UnicodeDecodeError as error:
        raise UnreadableError("not UTF-8") from error
    except RecursionError as error:
        raise UnreadableError(f"nested more than {MAX_DEPTH} levels") from error
    except yaml.YAMLError as error:
        raise UnreadableError(f"not YAML: {' '.join(str(error).split()):.200}") from error
    except UnreadableError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # a date such as 2024-99-99
        raise UnreadableError(f"not YAML: {first_line(error):.200}") from error


def _check_events(text: str) -> None:
    """Refuse deep or long YAML before anything is built; parsing stops at the limit."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UnreadableError(f"nested more than {MAX_DEPTH} levels")
        if number > 2 * MAX_YAML_NODES:
            raise UnreadableError(f"holds more than {MAX_YAML_NODES:,} values")


def _written_out(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Number of values of a node when aliases are written out."""
    key = id(node)
    if key in above:
        raise UnreadableError("a value holds itself")
    if len(above) > MAX_DEPTH:
        raise UnreadableError(f"nested more than {MAX_DEPTH} levels")
    if key not in sizes:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        above.add(key)
        sizes[key] = 1 + sum(_written_out(child, sizes, above) for child in children)
        above.remove(key)
    return sizes[key]
