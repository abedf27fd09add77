"""Outputs of commands: one that cannot be written is told before the work, not after it."""

from pathlib import Path

from megatron_croc.atomic_files import why_unwritable
from megatron_croc.errors import ConfigError


def refuse_unwritable(option: str, folder: Path) -> None:
    """Refuse a folder in which no file can be made; leaves nothing behind.

    Args:
        option: name of the option, such as "--out".
        folder: folder that will be written to, or made.

    Raises:
        ConfigError: names the reason.
    """
    if (reason := why_unwritable(folder)) is not None:
        raise ConfigError(f"{option} {folder}: cannot be written ({reason}); name another folder")
