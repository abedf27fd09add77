"""Checks of a run against its promised behaviour."""

import re

from megatron_croc.verification.faults.launch import Exit


class BrokenPromiseError(AssertionError):
    """A run did not behave as promised."""


def expect(condition: bool, otherwise: str) -> None:
    """Raise BrokenPromiseError unless the condition holds."""
    if not condition:
        raise BrokenPromiseError(otherwise)


def check_exits(exits: list[Exit], statuses: list[int]) -> None:
    """Compare exit statuses; the error holds the last output of the first wrong rank."""
    for rank, (end, status) in enumerate(zip(exits, statuses, strict=True)):
        said = end.output.strip().splitlines()[-3:]
        expect(end.status == status, f"rank {rank} ended with {end.status}, not {status}: {said}")


def check_said(exits: list[Exit], pattern: str) -> None:
    """Require that some rank printed text that matches `pattern`."""
    output = "\n".join(end.output for end in exits)
    expect(re.search(pattern, output) is not None, f"no rank printed {pattern!r}")
