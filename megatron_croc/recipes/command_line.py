"""From the words of a command line to a RunConfig: recipe < YAML file < flags and overrides.

--recipe croc_7b/pretrain_croc --config mine.yaml --micro-batch-size 2 optimizer.lr=1e-5

A YAML file may name its recipe (`recipe: croc_7b/pretrain_croc`), and is then a whole run.
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
    """A parser of the options all commands share; a command adds its own before parsing.

    The settings are not argparse's: `parse_command` reads them, to report every fault at once.
    """
    # Abbreviations would let --lr-decay mean whatever setting happens to start so.
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
        "--config", metavar="FILE.yaml", help="settings that change the recipe's, and its `recipe:`"
    )
    return parser


def parse_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, RunConfig]:
    """Parse a command's own options and the run it is about.

    Args:
        parser: from `run_parser`, with the command's own options added.
        argv: words after the program's name; default sys.argv[1:].

    Returns:
        The options, with `recipe` as the flag or the file names it, and the run. `--help` prints
        the values of recipe and file as the defaults, and exits.

    Raises:
        ConfigError: with every fault of recipe, file, flags and overrides, a line each.
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
    """Build the run of recipe and file; `options.recipe` becomes the name that either gives."""
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
    """What --config holds; empty without one, or with a fault."""
    if path is None:
        return {}
    try:
        return read_yaml(path)
    except ConfigError as error:
        faults.append(str(error))
        return {}


def parse_run(argv: Sequence[str] | None, *, prog: str, description: str) -> RunConfig:
    """The run described by a command line that has no options of its own."""
    return parse_command(run_parser(prog=prog, description=description), argv)[1]
