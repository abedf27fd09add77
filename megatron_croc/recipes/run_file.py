"""Short YAML file of a run for --config: its recipe, and the settings that differ from it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from megatron_croc.atomic_files import write_atomically
from megatron_croc.config.base import Changes, as_sections
from megatron_croc.config.run import RunConfig
from megatron_croc.config.settings import get_setting, settings_of
from megatron_croc.errors import ConfigError
from megatron_croc.recipes import get_recipe

HEADER = "# Written by croc"
"""First words of all files written here; other files are not overwritten."""


def as_run_file(
    run: RunConfig, recipe: str | None, *, always: Collection[str] = (), comment: str = ""
) -> str:
    """Return a run as YAML; --config reads it as an equal run.

    Args:
        run: the run.
        recipe: name of its recipe; None: the defaults of the dataclasses.
        always: paths of settings to write even if they equal the recipe's.
        comment: lines for the beginning of the file.
    """
    base = RunConfig() if recipe is None else get_recipe(recipe)
    changes: Changes = {}
    for setting in settings_of(RunConfig):
        value = get_setting(run, setting.path)
        if setting.path in always or value != get_setting(base, setting.path):
            changes[setting.path] = value
    tree: dict[str, Any] = {} if recipe is None else {"recipe": recipe}
    tree |= as_sections(changes)
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    body = yaml.safe_dump(tree, sort_keys=False, default_flow_style=False)
    return f"{HEADER}: {head.removeprefix('# ')}{body}"


def write_run_file(path: Path, text: str) -> None:
    """Write the text of `as_run_file`.

    Raises:
        ConfigError: the file exists and was written by hand, or it cannot be written.
    """
    try:
        if path.exists() and not path.read_text(encoding="utf-8").startswith(HEADER):
            raise ConfigError(f"--write {path}: exists and was not written by croc; rename it")
        write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(f"--write {path}: cannot be written ({error.strerror})") from error
