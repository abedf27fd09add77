"""Command line -> RunConfig: recipe < YAML file < flags and overrides.

--recipe croc_7b/pretrain_croc --config mine.yaml --micro-batch-size 2 optimizer.lr=1e-5

A YAML file that names its recipe (`recipe: croc_7b/pretrain_croc`) describes a whole run.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_croc.config.base import (
    apply_changes,
    changes_from_tree,
    changes_from_words,
    raise_faults,
    read_yaml,
    settings_help,
)
from megatron_croc.config.parser import CommandParser
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.recipes import get_recipe, list_recipes


def run_parser(*, prog: str, description: str) -> argparse.ArgumentParser:
    """Build a parser of the options that all commands share; a command adds its own.

    Settings are not options of the parser: `parse_command` reads them and reports all faults.
    """
    # With abbreviations, a wrong --lr-decay would set any setting that begins like it.
    parser = CommandParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show every setting and exit")
    parser.add_argument(
        "--recipe", metavar="NAME/STAGE", help="one of " + ", ".join(list_recipes())
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="settings that differ from the recipe, and `recipe:`"
    )
    return parser


def parse_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, RunConfig]:
    """Parse the options of a command, and the settings of its run.

    Args:
        parser: from `run_parser`, with the options of the command.
        argv: arguments after the program's name; None: sys.argv[1:].

    Returns:
        options, with `recipe` from the flag or the file, and the run. `--help` prints the values of
        recipe and file as defaults, and exits.

    Raises:
        ConfigError: has all faults of recipe, file, flags and overrides, one line each.
    """
    options, words = parser.parse_known_args(argv)
    faults: list[str] = []
    run = _recipe_and_file(options, faults)
    if options.help:
        raise_faults(faults)
        print(parser.format_help().rstrip())
        if options.recipe is not None:
            print(f"\ndefaults of the settings: those of {options.recipe}", end="")
            print(f" changed by {options.config}" if options.config else "")
        print(settings_help(run))
        parser.exit()
    if options.recipe is None and options.config is None:
        faults.append(f"--recipe is not given; there are {', '.join(list_recipes())}")
    apply_changes(run, changes_from_words(RunConfig, words, faults))
    raise_faults(faults)
    return options, run


def _recipe_and_file(options: argparse.Namespace, faults: list[str]) -> RunConfig:
    """Build the run of recipe and file; sets `options.recipe` to the name that either gives."""
    tree = _config_file(options.config, faults)
    named = tree.pop("recipe", None)
    if options.recipe is None and named is not None:
        options.recipe = str(named)
    run = RunConfig()
    if options.recipe is not None:
        try:
            run = get_recipe(options.recipe)
        except ConfigError as error:
            faults.append(str(error))
    source = options.config or "--config"
    apply_changes(run, changes_from_tree(RunConfig, tree, faults, source=source))
    return run


def _config_file(path: str | None, faults: list[str]) -> dict[str, Any]:
    """Content of --config; empty without one, or with a fault."""
    if path is None:
        return {}
    try:
        return read_yaml(path)
    except ConfigError as error:
        faults.append(str(error))
        return {}


def parse_run(argv: Sequence[str] | None, *, prog: str, description: str) -> RunConfig:
    """Return the run of a command that has no options of its own."""
    return parse_command(run_parser(prog=prog, description=description), argv)[1]
