"""Errors that the user can fix: one line on stderr and exit status 1."""

import functools
import sys
from collections.abc import Callable, Sequence

from megatron_croc.errors import CrocError
from megatron_croc.log import rank

Command = Callable[[Sequence[str] | None], int]
"""Main function of a command: words after its name (None: those of sys.argv) -> exit status."""


def print_error(error: CrocError) -> None:
    """Print an error; ranks other than 0 name themselves."""
    who = "error" if rank() == 0 else f"error on rank {rank()}"
    print(f"{who}: {error}", file=sys.stderr)


def reports_errors(command: Command) -> Command:
    """Wrap a command: a CrocError is printed, and the exit status is 1."""

    @functools.wraps(command)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return command(argv)
        except CrocError as error:
            print_error(error)
            return 1

    return run
