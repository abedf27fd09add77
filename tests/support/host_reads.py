"""Places where a step reads tensors on the host; on a GPU each waits for the device."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOTS = tuple(
    str(Path(module.__file__).parent)  # type: ignore[arg-type]
    for name in ("megatron_croc", "megatron.core")
    if (module := __import__(name, fromlist=["_"]))
)

_READS = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.bincount,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
)
"""Operations whose result, or its size, the host must know."""

_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put_)
"""A boolean index is counted, and its size read."""

_METHODS = ("tolist", "cpu", "numpy")
"""Reads that no dispatcher sees where the tensor is on the CPU already."""


def _place() -> str:
    """file:function of the innermost frame of ours or megatron-core's."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if root := next((root for root in ROOTS if name.startswith(root)), None):
            return f"{Path(name).relative_to(Path(root).parent)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class _Watch(TorchDispatchMode):
    def __init__(self, reads: Counter[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in _INDEXING and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        is_fill = packet is torch.ops.aten.index_put_ and args[2].numel() == 1  # masked_fill_
        if packet in _READS or (by_mask and not is_fill):
            self.reads[_place()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """Count reads by place, on every tensor: which of them are on the host anyway is not seen."""
    reads: Counter[str] = Counter()
    real = {name: getattr(Tensor, name) for name in _METHODS}

    def counted(name):
        def method(self, *args, **kwargs):
            reads[_place()] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return real[name](self, *args, **kwargs)

        return method

    for name in _METHODS:
        setattr(Tensor, name, counted(name))
    try:
        with _Watch(reads):
            yield reads
    finally:
        for name, method in real.items():
            setattr(Tensor, name, method)
