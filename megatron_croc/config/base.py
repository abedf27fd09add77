"""Reading and writing of configurations: YAML files, flags and overrides.

A setting has three names, all derived from the fields of the dataclasses (see settings.py):

    YAML       model: {language_model: {num_layers: 4}}
    flag       --num-layers 4
    override   model.language_model.num_layers=4

Functions collect faults instead of stopping at the first one, so that a user can fix a command at
once. A fault is one line that names the setting, its value and the way out.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from megatron_croc import file_reading
from megatron_croc.config.settings import (
    Setting,
    Value,
    get_setting,
    set_setting,
    settings_of,
)
from megatron_croc.errors import ConfigError

Changes = dict[str, Value]
"""Dotted path of a setting -> its new value."""


def raise_faults(faults: Sequence[str]) -> None:
    """Raise one ConfigError with all faults, one line each; return if there are none."""
    if faults:
        raise ConfigError("\n".join(faults))


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggestion for an unknown word: " (did you mean ...?)", or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def apply_changes(config: object, changes: Mapping[str, Value]) -> None:
    """Set fields of a configuration in place."""
    for path, value in changes.items():
        set_setting(config, path, value)


# ---------------------------------------------------------------------------------------------
# YAML


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        ConfigError: the file is missing, not YAML, too large or deep, or not a mapping.
    """
    try:
        tree = file_reading.read_yaml(path)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except file_reading.UnreadableError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must be sections of settings, got {tree!r:.60}")
    return cast(dict[str, Any], tree)


RETIRED = frozenset({"optimizer.optimizer_offload_fraction"})
"""Settings of earlier versions; ignored when found in the run.yaml of an old checkpoint."""


def changes_from_tree(
    config_type: type, tree: Mapping[str, Any], faults: list[str], *, source: str
) -> Changes:
    """Turn nested mappings into changes.

    Args:
        config_type: the dataclass the tree describes.
        tree: sections and settings, as read from YAML.
        faults: list that faults are appended to, one line each.
        source: name of the tree in those lines.
    """
    settings = {s.path: s for s in settings_of(config_type)}
    sections = {s.section for s in settings.values()} | {
        s.section.partition(".")[0] for s in settings.values()
    }
    changes: Changes = {}
    for path, value in _leaves(tree, sections, prefix=""):
        if path in settings:
            try:
                changes[path] = settings[path].from_value(value)
            except ValueError as error:
                faults.append(f"{source}: {path} {error}")
        elif path in RETIRED:
            continue
        elif path in sections:
            faults.append(f"{source}: {path} is a section and needs settings, got {value!r:.60}")
        else:
            faults.append(f"{source}: unknown setting {path}{_suggestion(path, settings.values())}")
    return changes


def _leaves(tree: Mapping[str, Any], sections: set[str], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and path in sections:
            yield from _leaves(cast(Mapping[str, Any], value), sections, prefix=f"{path}.")
        elif value is not None or path not in sections:  # an empty section changes nothing
            yield path, value


def _suggestion(path: str, settings: Iterable[Setting]) -> str:
    """Suggestion for an unknown path: the right path of that name, or of a similar name."""
    settings = list(settings)
    name = path.rpartition(".")[2]
    for setting in settings:
        if setting.name == name:
            return f" (it is {setting.path})"
    by_name = {s.name: s.path for s in settings}
    close = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.6)
    return f" (did you mean {by_name[close[0]]}?)" if close else ""


def to_tree(config: object) -> dict[str, Any]:
    """Convert a configuration to nested dicts of plain values, in the order of the fields."""
    assert dataclasses.is_dataclass(config)
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            tree[field.name] = to_tree(value)
        else:
            tree[field.name] = (
                list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value
            )
    return tree


def to_yaml(config: object) -> str:
    """Convert a complete configuration to YAML; reading it back gives an equal one."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=False)


def as_sections(changes: Mapping[str, Value]) -> dict[str, Any]:
    """Convert changes to nested dicts of plain values, as they are written in YAML."""
    tree: dict[str, Any] = {}
    for path, value in changes.items():
        *sections, name = path.split(".")
        section = tree
        for word in sections:
            section = section.setdefault(word, {})
        section[name] = list(value) if isinstance(value, tuple) else value
    return tree


# ---------------------------------------------------------------------------------------------
# Words of a command line


def changes_from_words(config_type: type, words: Sequence[str], faults: list[str]) -> Changes:
    """Read flags and dotted overrides; the last value of a repeated setting is used.

    Args:
        config_type: the dataclass whose fields give the flags.
        words: `--num-layers 4`, `--num-layers=4`, `--bf16`, `--no-bf16`,
            `model.language_model.num_layers=4`, in any order.
        faults: list that faults are appended to, one line each.
    """
    settings = settings_of(config_type)
    by_flag = {s.flag: s for s in settings}
    negated = {"--no-" + s.flag[2:]: s for s in settings if s.is_bool}
    by_path = {s.path: s for s in settings}
    changes: Changes = {}

    def change(setting: Setting, name: str, texts: Sequence[str]) -> None:
        try:
            changes[setting.path] = setting.from_text(texts)
        except ValueError as error:
            faults.append(f"{name} {error}")

    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, text = word.partition("=")
        if name in by_path and equals:
            setting = by_path[name]
            change(setting, name, text.split(",") if setting.is_tuple else [text])
        elif word in negated:
            changes[negated[word].path] = False
        elif name in by_flag:
            setting = by_flag[name]
            if equals:
                values = text.split(",") if setting.is_tuple else [text]
            else:
                values, position = _values(setting, words, position, by_path)
            change(setting, name, values)
        elif name.startswith("--"):
            known = [*by_flag, *negated]
            faults.append(f"unknown flag {name}{nearest(name.replace('_', '-'), known)}")
            # Skip its values: each would be reported as a fault of its own.
            while position < len(words) and not _starts_setting(words[position], by_path):
                position += 1
        elif equals:
            faults.append(f"unknown setting {name}{_suggestion(name, settings)}")
        else:
            faults.append(
                f"unexpected word {word}: settings are --flag value or path.to.field=value"
            )
    return changes


# A misspelt override is no value of the flag before it; `runs/a=b` and `./a.b=c` are values.
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")


def _starts_setting(word: str, known_paths: Mapping[str, Setting]) -> bool:
    return (
        word.startswith("--")
        or word.partition("=")[0] in known_paths
        or _OVERRIDE.match(word) is not None
    )


def _values(
    setting: Setting, words: Sequence[str], position: int, known_paths: Mapping[str, Setting]
) -> tuple[Sequence[str], int]:
    """Words that are the values of a flag, and the position after them."""
    if setting.is_bool:
        return ["true"], position
    end = position
    limit = len(words) if setting.is_tuple else min(position + 1, len(words))
    while end < limit and not _starts_setting(words[end], known_paths):
        end += 1
    return words[position:end], end


def as_flags(config_type: type, changes: Mapping[str, Value]) -> str:
    """Write changes as flags of a command line, in the order of the fields."""
    words: list[str] = []
    for setting in settings_of(config_type):
        if setting.path not in changes:
            continue
        value = changes[setting.path]
        if setting.is_bool:
            words.append(setting.flag if value else f"--no-{setting.flag[2:]}")
        else:
            words.append(f"{setting.flag} {shown(value)}")
    return " ".join(words)


def settings_help(config: object) -> str:
    """Help text: every flag with docstring and its value in `config`, grouped by section."""
    lines: list[str] = []
    section = None
    for setting in settings_of(type(config)):
        if setting.section != section:
            section = setting.section
            lines.append(f"\n{section or 'run'}:")
        flag = setting.flag
        if setting.is_bool:
            flag = f"{flag}, --no-{flag[2:]}"
        default = shown(get_setting(config, setting.path))
        lines.append(f"  {flag}  [{setting.expected}; default {default}]")
        lines.append(f"      {setting.doc}")
    return "\n".join(lines)


def shown(value: Value | list[Any]) -> str:
    """Format a value as it is written after its flag."""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
