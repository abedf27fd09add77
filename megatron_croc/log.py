"""Logging that names the rank, and silence of libraries; usable before torch is imported.

The logger, the set of messages logged once and the filters of warnings belong to the whole process
(docs/design.md, "State that belongs to the whole process"). `import megatron_croc` imports this
module, so the filters are set before any module of the project imports torch or megatron.
"""

import functools
import logging
import os
import sys
import warnings

ROOT = "megatron_croc"

_EQUAL_ON_ALL = "equal_on_all_ranks"
"""Attribute of the records of `log_on_rank_zero`."""


def rank() -> int:
    """Rank of this process, from torchrun's environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, from torchrun's environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def _root() -> logging.Logger:
    """Logger of the project: one handler on stdout, separate from the process's root logger."""
    root = logging.getLogger(ROOT)
    root.setLevel(os.environ.get("LOG_LEVEL", "INFO").upper())
    root.propagate = False  # libraries that call logging.basicConfig would print each line twice
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_ShortFormatter(datefmt="%H:%M:%S"))
    root.addHandler(handler)
    return root


class _ShortFormatter(logging.Formatter):
    """Lines such as `12:00:00 [rank 3] WARNING: message`, with no word that goes without saying.

    The level is left out of an INFO line, the rank of a line that is equal on every rank and of a
    job of one process. LOG_LEVEL=DEBUG adds the module.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        parts = [record.asctime]
        if world_size() > 1 and not hasattr(record, _EQUAL_ON_ALL):
            parts.append(f"[rank {rank()}]")
        told = [] if record.levelno == logging.INFO else [record.levelname]
        if _root().level <= logging.DEBUG:
            told.append(record.name)
        if told:
            parts.append(" ".join(told) + ":")
        return " ".join([*parts, record.message])

    def usesTime(self) -> bool:
        return True


def get_logger(name: str) -> logging.Logger:
    """Logger of one module; it writes on every rank.

    Args:
        name: `__name__` of the module.
    """
    root = _root()
    if name == ROOT:
        return root
    return root.getChild(name.removeprefix(f"{ROOT}."))


def log_on_rank_zero(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Log on rank 0 only, for messages that are equal on every rank."""
    if rank() == 0:
        logger.log(level, message, *args, extra={_EQUAL_ON_ALL: True})


_logged_once: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Log a message once per process, on rank 0 only."""
    key = (logger.name, message % args if args else message)
    if key not in _logged_once:
        _logged_once.add(key)
        log_on_rank_zero(logger, level, message, *args)


def _quiet_libraries() -> None:
    """Silence notes of torch and megatron-core about optional packages, and about each other.

    A filter names the library's module or the message, so warnings of other code stay.
    """
    # About missing apex and Transformer Engine.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\b")
    # megatron 0.16 uses names of torch.distributed that torch 2.13 has renamed.
    for module in (r"torch\.distributed\b", r"megatron\.core\b"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # `croc doctor` shows devices and versions, so torch need not.
    warnings.filterwarnings(
        "ignore", message="The pynvml package is deprecated", category=FutureWarning
    )
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """False for the note of a build of torch for CUDA, on a machine without a GPU."""
    return not record.getMessage().startswith("No CUDA runtime is found")


_quiet_libraries()
