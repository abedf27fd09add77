"""Logging that knows its rank, read from the environment: usable before torch is imported."""

import functools
import logging
import os
import sys
import warnings

ROOT = "megatron_croc"


def rank() -> int:
    """Rank of this process as torchrun tells it; 0 when there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes that torchrun started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def _root() -> logging.Logger:
    """The project's logger: one handler on stdout, apart from the root logger of the process."""
    root = logging.getLogger(ROOT)
    root.setLevel(os.environ.get("LOG_LEVEL", "INFO").upper())
    root.propagate = False  # libraries that call logging.basicConfig would print each line twice
    handler = logging.StreamHandler(sys.stdout)
    form = f"%(asctime)s [rank {rank()}] %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    root.addHandler(handler)
    return root


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; every rank that logs through it is heard.

    Args:
        name: `__name__` of the module.
    """
    root = _root()
    if name == ROOT:
        return root
    return root.getChild(name.removeprefix(f"{ROOT}."))


def log_on_rank_zero(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Log on rank 0 only: for what is the same on every rank."""
    if rank() == 0:
        logger.log(level, message, *args)


_said: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Log a message once per process and rank 0 only, however often the code comes by."""
    key = (logger.name, message % args if args else message)
    if key not in _said:
        _said.add(key)
        log_on_rank_zero(logger, level, message, *args)


def quiet_megatron() -> None:
    """Silence megatron-core's notes on absent apex and Transformer Engine on every rank."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core.*")
    # megatron 0.16 calls torch.distributed by names that torch 2.13 has just renamed.
    for module in (r"torch\.distributed.*", r"megatron\.core.*"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


quiet_megatron()  # its notes come while it is imported, which this module is before
