"""Optional GPU libraries, and the versions that this code is written for.

Their interfaces are partly private and change without notice, so another version is logged once,
with the interfaces that are used. tests/libraries tests the oldest and newest version of each range
with the library's own Python code.
"""

import functools
import logging
import re
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from megatron_croc.log import get_logger, log_on_rank_zero


class Known(NamedTuple):
    """Range of known versions, and the interfaces used."""

    first: tuple[int, int]
    """Oldest known major and minor version."""

    last: tuple[int, int]
    """Newest known major and minor version."""

    modules: tuple[str, ...]
    """Modules to import: the first one that is installed."""

    assumed: str
    """Interfaces that this code relies on, as text for the log."""

    @property
    def range(self) -> str:
        """Text such as "2.8 to 2.20"."""
        return " to ".join("{}.{}".format(*edge) for edge in (self.first, self.last))

    def covers(self, found: str) -> bool:
        """Return True if a version is in the range; False if it is not a number."""
        numbers = re.match(r"(\d+)\.(\d+)", found)
        return (
            numbers is not None
            and self.first <= tuple(int(number) for number in numbers.groups()) <= self.last
        )


KNOWN = {
    "transformer-engine": Known(
        first=(2, 8),
        last=(2, 20),
        modules=("transformer_engine",),
        assumed="the names of its layers' parameters and the state of its FusedAdam",
    ),
    "flash-attn": Known(
        first=(2, 7),
        last=(2, 8),
        modules=("flash_attn.flash_attn_interface",),
        assumed="the arguments of _flash_attn_varlen_forward and _backward",
    ),
    "flash-attn-3": Known(
        first=(3, 0),
        last=(3, 0),
        # Its setup.py installs it as a top-level module, Transformer Engine's guide in a package.
        modules=("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
        assumed="the arguments of _flash_attn_forward and _backward",
    ),
    "flash-attn-4": Known(
        first=(4, 0),
        last=(4, 0),
        modules=("flash_attn.cute",),
        assumed="the arguments of flash_attn_func and of its mask_mod",
    ),
    "magi-attention": Known(
        first=(1, 1),
        last=(1, 1),
        modules=("magi_attention.functional",),
        assumed="the arguments of flex_flash_attn_func",
    ),
}
"""Known versions by distribution."""


@functools.cache
def name_unknown_version(distribution: str) -> None:
    """Warn once if the installed version of `distribution` is not among the known ones."""
    known = KNOWN[distribution]
    try:
        found = version(distribution)
    except PackageNotFoundError:  # built from sources, without metadata
        found = "without a version"
    if known.covers(found):
        return
    log_on_rank_zero(
        get_logger(__name__),
        logging.WARNING,
        "%s %s is none of the known versions (%s): %s are assumed to be those of %s",
        *(distribution, found, known.range, known.assumed, "{}.{}".format(*known.last)),
    )
