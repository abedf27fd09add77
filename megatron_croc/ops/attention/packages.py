"""Optional packages of attention kernels: installed, new enough, and for such tensors."""

import functools
import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_croc.libraries import KNOWN


def refused_by_cuda_kernels(query: Tensor, max_head_dim: int) -> str | None:
    """Reason against any flash kernel for tensors like `query`; None if there is none."""
    if not query.is_cuda:
        return f"the tensors are on {query.device}, CUDA is needed"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"{query.dtype} tensors, float16 or bfloat16 is needed"
    head_dim = query.shape[-1]
    if head_dim % 8 or head_dim > max_head_dim:
        return f"head dim {head_dim}, a multiple of 8 up to {max_head_dim} is needed"
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device."""
    return torch.get_device_module(device).get_device_capability(device)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Name of a GPU."""
    return torch.get_device_module(device).get_device_name(device)


def missing(distribution: str) -> str | None:
    """Reason if `distribution` cannot be imported, else None."""
    found = _import(distribution)
    return found if isinstance(found, str) else None


@functools.cache
def _import(distribution: str) -> ModuleType | str:
    """First module of `distribution` that can be imported, or the reason if none can."""
    reasons: list[str] = []
    for module in KNOWN[distribution].modules:
        try:
            return importlib.import_module(module)
        except (ImportError, OSError) as error:
            reasons.append(f"{module} cannot be imported ({error})")
    return ", ".join(reasons)


def kernels_of(distribution: str) -> Any:
    """Module of the kernels; call it only after `missing` returned None."""
    found = _import(distribution)
    assert isinstance(found, ModuleType), found
    return found


@functools.cache
def too_old(distribution: str) -> str | None:
    """Reason if the installed `distribution` is too old for this interface, else None."""
    least = KNOWN[distribution].first
    try:
        found = version(distribution)
    except PackageNotFoundError as error:
        return f"its version is unknown ({error})"
    if tuple(int(part) for part in found.split(".")[:2]) < least:
        return f"{distribution} {found} is too old, {'.'.join(map(str, least))} or later is needed"
    return None
