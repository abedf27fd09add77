"""Choice of the operations on positions between the two calls of the flip.

`torch_position_ops.py` is the reference. `triton_position_ops.py` needs one kernel launch for each
operation and no intermediate tensors; it is used where Triton compiles for the device.
"""

import functools
import importlib
import logging
import os

import torch
from torch import Tensor

from megatron_croc.errors import first_line
from megatron_croc.log import get_logger, log_once
from megatron_croc.ops.attention.contract import FlashOutput, PositionOps
from megatron_croc.ops.attention.torch_position_ops import TORCH_POSITION_OPS


def choose_position_ops(x: Tensor) -> PositionOps:
    """Return Triton's kernels if they run on tensors like `x`, else torch operations.

    On CUDA the log gives the reason, once, if Triton is not used.
    """
    if not x.is_cuda and not _interprets():
        return TORCH_POSITION_OPS
    operations, reason = _triton_position_ops(x.device)
    if reason is not None:
        log_once(
            get_logger(__name__),
            logging.INFO,
            "attention: positions are gathered by torch operations, because %s",
            reason,
        )
    return operations


def _interprets() -> bool:
    """True if Triton interprets its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_position_ops(device: torch.device) -> tuple[PositionOps, str | None]:
    """Triton's kernels and None, or torch operations and the reason."""
    try:
        module = importlib.import_module("megatron_croc.ops.attention.triton_position_ops")
        operations: PositionOps = module.TRITON_POSITION_OPS
        ones = torch.ones(2, 1, 8, device=device)
        zeros = torch.zeros(1, 2, device=device)
        output, more = FlashOutput(ones.clone(), zeros.clone()), FlashOutput(ones, zeros)
        operations.merge(output, more, torch.arange(2, device=device))
    except ImportError as error:
        return TORCH_POSITION_OPS, f"triton cannot be imported ({first_line(error)})"
    # Compilation needs a driver, a C compiler and an assembler; each raises errors of its own type.
    except Exception as error:
        return TORCH_POSITION_OPS, f"triton does not compile here ({first_line(error)})"
    return operations, None
