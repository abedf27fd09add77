"""Logging with the rank in every line, usable before torch is imported.

The logger and the set of messages logged once belong to the whole process (docs/design.md, "State
that belongs to the whole process").
"""

import functools
import logging
import os
import sys
import warnings

ROOT = "megatron_croc"


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
    form = f"%(asctime)s [rank {rank()}] %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    root.addHandler(handler)
    return root


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
        logger.log(level, message, *args)


_logged_once: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Log a message once per process, on rank 0 only."""
    key = (logger.name, message % args if args else message)
    if key not in _logged_once:
        _logged_once.add(key)
        log_on_rank_zero(logger, level, message, *args)


def quiet_megatron() -> None:
    """Silence megatron-core's warnings about missing apex and Transformer Engine."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core.*")
    # megatron 0.16 uses names of torch.distributed that torch 2.13 has renamed.
    for module in (r"torch\.distributed.*", r"megatron\.core.*"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def quiet_torch() -> None:
    """Silence torch's notes about CUDA and pynvml; `croc doctor` shows devices and versions."""
    # A build for CUDA without a GPU: "No CUDA runtime is found, using CUDA_HOME=...".
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message="The pynvml package is deprecated", category=FutureWarning
    )


quiet_torch()
quiet_megatron()  # megatron warns while it is imported, which happens after this module
