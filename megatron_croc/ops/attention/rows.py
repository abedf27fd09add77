"""What the flip does to rows between its two flash calls: gather, merge, add.

torch_rows.py is the meaning; triton_rows.py does each of the four in one launch, without the
intermediate tensors. `choose_rows` takes it where Triton compiles for the device.
"""

import functools
import importlib
import logging
import os

import torch
from torch import Tensor

from megatron_croc.errors import first_line
from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.attention.contract import Rows
from megatron_croc.ops.attention.torch_rows import TORCH_ROWS


def choose_rows(x: Tensor) -> Rows:
    """Triton's kernels where they run on tensors like `x`, torch operations elsewhere.

    Why Triton is passed over on CUDA is said in the log, once.
    """
    if not x.is_cuda and not _interpreting():
        return TORCH_ROWS
    rows, reason = _triton_rows(x.device)
    if reason is not None:
        log_once(
            get_logger(__name__), logging.INFO, "attention rows: torch operations, for %s", reason
        )
    return rows


def _interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_rows(device: torch.device) -> tuple[Rows, str | None]:
    """Triton's kernels, or torch operations and why."""
    try:
        rows: Rows = importlib.import_module("megatron_croc.ops.attention.triton_rows").TRITON_ROWS
        ones = torch.ones(2, 1, 8, device=device)
        zeros = torch.zeros(1, 2, device=device)
        rows.merge(ones.clone(), zeros.clone(), ones, zeros, torch.arange(2, device=device))
    except ImportError as error:
        return TORCH_ROWS, f"triton cannot be imported ({first_line(error)})"
    # Compiling needs a driver, a C compiler and an assembler, and each fails in a way of its own.
    except Exception as error:
        return TORCH_ROWS, f"triton does not compile here ({first_line(error)})"
    return rows, None
