"""Forward passes without the C++ shim: what torch does in C++ with a device's guard, in Python.

Without the shim torch has no guard for `cuda`, so indexing and conversions to a device without its
number fail, and so does everything that records a backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_croc.rehearsal.fake_tensors import DEVICE, is_on_device


def install() -> None:
    """Replace the functions of Tensor that need the guard."""
    real_item, real_set, real_to = Tensor.__getitem__, Tensor.__setitem__, Tensor.to

    def get_item(tensor: Tensor, index: Any) -> Tensor:
        return _indexed(tensor, index) if is_on_device(tensor) else real_item(tensor, index)

    def set_item(tensor: Tensor, index: Any, value: Any) -> None:
        if not is_on_device(tensor):
            real_set(tensor, index, value)
        elif isinstance(index, Tensor) and index.dtype == torch.bool:
            ones = (1,) * (tensor.dim() - index.dim())
            tensor.masked_fill_(index.view(*index.shape, *ones), 0)
        elif isinstance(value, Tensor):  # no data: which elements are written does not matter
            value.expand_as(_indexed(tensor, index))
        else:
            _indexed(tensor, index).fill_(value)

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = (*map(_numbered, args[:1]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        return real_to(tensor, *args, **kwargs)

    Tensor.__invert__ = lambda tensor: torch.bitwise_not(tensor)  # type: ignore[method-assign]
    Tensor.__getitem__ = get_item  # type: ignore[method-assign,assignment]
    Tensor.__setitem__ = set_item  # type: ignore[method-assign,assignment]
    Tensor.to = to  # type: ignore[method-assign,assignment]


def _numbered(device: Any) -> Any:
    """The device with its number, if it is `cuda` or a number alone."""
    if isinstance(device, int) and not isinstance(device, bool):
        return DEVICE
    return DEVICE if isinstance(device, str | torch.device) and str(device) == "cuda" else device


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index] by views, then by one gather with the indices that are tensors."""
    items = list(index) if isinstance(index, tuple) else [index]
    num_dims = sum(_dims_of(item) for item in items)
    if any(item is Ellipsis for item in items):
        place = next(n for n, item in enumerate(items) if item is Ellipsis)
        items[place : place + 1] = [slice(None)] * (tensor.dim() - num_dims)
    dim, gathered = 0, dict[int, Tensor]()
    for item in items:
        if item is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(item, slice):
            begin, end, step = item.indices(tensor.shape[dim])
            if (begin, end, step) != (0, tensor.shape[dim], 1):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, begin, end, step)
            dim += 1
        elif isinstance(item, int):
            tensor = tensor.select(dim, item)
        else:
            gathered[dim] = torch.as_tensor(item, device=tensor.device)
            dim += _dims_of(item)
    if not gathered:
        return tensor
    indices: list[Tensor | None] = [gathered.get(n) for n in range(max(gathered) + 1)]
    return torch.ops.aten.index.Tensor(tensor, indices)


def _dims_of(item: Any) -> int:
    """Number of dimensions that one index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1
