"""Settings of a configuration: every leaf field, with type, help text and conversion.

A configuration is a tree of dataclasses. Each leaf is one Setting, derived from its field, so YAML
keys, dotted overrides, command-line flags and help texts have one source.
"""

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

Value = bool | int | float | str | tuple[Any, ...] | None

_NONE_WORDS = ("none", "null")
_TRUE_WORDS = ("true", "yes", "on", "1")
_FALSE_WORDS = ("false", "no", "off", "0")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Leaf field of a configuration."""

    path: str
    """Dotted path, such as model.language_model.num_layers."""

    annotation: Any
    """Type annotation of the field."""

    default: Any
    """Value in a default configuration."""

    doc: str
    """Docstring under the field; the help text."""

    @property
    def name(self) -> str:
        """Name of the field, unique in the configuration."""
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> str:
        """Dotted path of its dataclass; empty for the top level."""
        return self.path.rpartition(".")[0]

    @property
    def flag(self) -> str:
        """Command-line flag, in megatron's spelling."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_bool(self) -> bool:
        """True when the flag takes no value (--bf16, --no-bf16)."""
        return self.annotation is bool

    @property
    def is_tuple(self) -> bool:
        """True when the flag takes several values."""
        return get_origin(self.annotation) is tuple

    @property
    def expected(self) -> str:
        """Description of the accepted values."""
        return _expected(self.annotation)

    def from_text(self, texts: Sequence[str]) -> Value:
        """Convert words of a command line.

        Raises:
            ValueError: not a value of this setting; the message names the accepted values.
        """
        if self.is_tuple:
            empty = len(texts) == 1 and texts[0].lower() in _NONE_WORDS
            item = get_args(self.annotation)[0]
            return self.from_value([] if empty else [_guess(text, item) for text in texts])
        if len(texts) != 1:
            raise ValueError(f"takes one value, got {' '.join(texts) or 'none'}")
        return self.from_value(_guess(texts[0], self.annotation))

    def from_value(self, value: object) -> Value:
        """Convert a value read from YAML; values that would lose precision are refused.

        Raises:
            ValueError: not a value of this setting; the message names the accepted values.
        """
        try:
            return _convert(value, self.annotation)
        except ValueError:
            raise ValueError(f"must be {self.expected}, got {value!r:.60}") from None


def _expected(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if _is_union(annotation):
        words = [_expected(a) for a in get_args(annotation) if a is not type(None)]
        return " or ".join([*words, "none"])
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        count = "any number of values" if Ellipsis in items else f"{len(items)} values"
        return f"{count}, each {_expected(items[0])}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[annotation]


def _is_union(annotation: Any) -> bool:
    """Return True if a type is X | Y or Union[X, Y]."""
    return isinstance(annotation, types.UnionType) or get_origin(annotation) is Union


def _guess(text: str, annotation: Any) -> object:
    """Convert a word to the value it looks like; settings of text keep the word."""
    options = get_args(annotation) if _is_union(annotation) else (annotation,)
    if type(None) in options and text.lower() in _NONE_WORDS:
        return None
    if str in options or get_origin(annotation) is Literal:
        return text
    if bool in options and text.lower() in _TRUE_WORDS + _FALSE_WORDS:
        return text.lower() in _TRUE_WORDS
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _convert(value: object, annotation: Any) -> Value:
    """Convert `value` to the type `annotation`; raise ValueError if that is not possible."""
    if _is_union(annotation):
        if value is None:
            return None
        for option in get_args(annotation):
            try:
                return _convert(value, option)
            except ValueError:
                pass
    elif get_origin(annotation) is Literal:
        if value in get_args(annotation):
            return typing.cast(Value, value)
    elif get_origin(annotation) is tuple:
        return _convert_tuple(value, get_args(annotation))
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif annotation in (bool, int, str) and type(value) is annotation:
        return value
    raise ValueError


def _convert_tuple(value: object, items: tuple[Any, ...]) -> tuple[Value, ...]:
    values = list(typing.cast(list[object], value)) if isinstance(value, list | tuple) else [value]
    if items[-1] is Ellipsis:
        items = (items[0],) * len(values)
    if len(values) != len(items):
        raise ValueError
    return tuple(_convert(v, item) for v, item in zip(values, items, strict=True))


@functools.cache
def settings_of(config_type: type) -> tuple[Setting, ...]:
    """All leaf fields of a tree of dataclasses, in source order."""
    return tuple(_walk(config_type, prefix=""))


def _walk(config_type: type, *, prefix: str) -> Iterator[Setting]:
    annotations = typing.get_type_hints(config_type)
    docs = field_docs(config_type)
    default = config_type()
    for field in dataclasses.fields(config_type):
        annotation = annotations[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from _walk(typing.cast(type, annotation), prefix=f"{prefix}{field.name}.")
        else:
            yield Setting(
                path=prefix + field.name,
                annotation=annotation,
                default=getattr(default, field.name),
                doc=docs.get(field.name, ""),
            )


@functools.cache
def field_docs(config_type: type) -> dict[str, str]:
    """Docstrings under the fields of a dataclass, each as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if is_field and is_text:
            assert isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


def get_setting(config: object, path: str) -> Any:
    """Value at a dotted path."""
    return functools.reduce(getattr, path.split("."), config)


def set_setting(config: object, path: str, value: Value) -> None:
    """Set the value at a dotted path."""
    section, _, name = path.rpartition(".")
    setattr(get_setting(config, section) if section else config, name, value)
