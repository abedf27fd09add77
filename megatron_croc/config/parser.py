"""Parser of a subcommand's options; a fault is one line with the nearest name."""

import argparse
import difflib
from collections.abc import Iterator
from typing import NoReturn, cast

_UNKNOWN = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, without the usage of many lines before an error."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        hint = f"{self.prog} --help shows the options"
        wrong = message.removeprefix(_UNKNOWN).split()[0].split("=")[0]
        if message.startswith(_UNKNOWN) and wrong.startswith("-"):
            close = difflib.get_close_matches(wrong, _option_names(self), n=1)
            hint = f"did you mean {close[0]}?" if close else hint
        self.exit(2, f"error: {self.prog}: {message}; {hint}\n")


def _option_names(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options of a parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):
            subcommands = cast(dict[str, argparse.ArgumentParser], action.choices)
            for subcommand in subcommands.values():
                yield from _option_names(subcommand)
