"""Tensors on a `cuda` device that have shapes and no data; CPU tensors stay real.

Operations that read a value from the device are answered with ones, and recorded with their place:
each of them makes a real host wait.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter

from megatron_croc.rehearsal.recorder import Recorder

_aten = torch.ops.aten

DEVICE = torch.device("cuda", 0)
"""With its index: without the shim torch cannot ask for the current one."""


def is_on_device(value: object) -> bool:
    """Return True for a fake tensor of the device."""
    # Not `.device`, which is an operation of its own while modes are active.
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def device_tensors(value: object) -> Iterator[FakeTensor]:
    """All fake tensors of the device among the arguments or results of an operation."""
    if isinstance(value, FakeTensor):
        if value.fake_device.type == "cuda":
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from device_tensors(item)
    elif isinstance(value, dict):
        yield from device_tensors(list(value.values()))


class DeviceMode(FakeTensorMode):
    """Make every new `cuda` tensor fake; reads of its values are recorded."""

    def __init__(self, recorder: Recorder) -> None:
        """Record device reads in `recorder`."""
        super().__init__(allow_non_fake_inputs=True)
        self._recorder = recorder
        self.host_is_real = True
        """False: CPU tensors are fake too, as while a model is built on the CPU."""

    @property
    def avoid_device_init(self) -> bool:  # type: ignore[override]
        """Return True: there is no device to initialise."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation on shapes, or really if all of it is on the CPU."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is _aten._pin_memory.default:
            return args[0]
        first = args[0] if args else None
        if isinstance(first, FakeTensor):
            if func is _aten._local_scalar_dense.default and first.constant is None:
                return self._read("item", first)
            if func is _aten.nonzero.default:
                self._recorder.device_read("nonzero")
                with self:
                    return torch.empty((0, first.dim()), dtype=torch.int64, device=first.device)
            if func is _aten.bincount.default:
                self._recorder.device_read("bincount")
                length = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
                with self:
                    return torch.empty(length, dtype=torch.int64, device=first.device)
            if func is _aten.equal.default:
                self._recorder.device_read("equal")
                return True
        elif self.host_is_real and _is_all_real(args, kwargs):
            return func(*args, **kwargs)
        out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func is _aten._to_copy.default and not isinstance(first, FakeTensor):
            out.host_value = first  # what the device would hold
        elif func is _aten._to_copy.default or func is _aten.copy_.default:
            self._look_for_copies_to_host(out, args, kwargs)
        return out

    def _look_for_copies_to_host(self, out: Any, args: Any, kwargs: Any) -> None:
        """Record a copy from the device that the host waits for."""
        source = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[0]
        is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if is_on_device(source) and out.device.type == "cpu" and not is_async:
            self._recorder.device_read("copy to the host")

    def _read(self, name: str, tensor: FakeTensor) -> bool | int | float:
        if tensor.device.type == "cuda":
            self._recorder.device_read(name)
        return _one(tensor.dtype)


def _is_all_real(args: Any, kwargs: Any) -> bool:
    for value in tree_iter((args, kwargs)):
        if isinstance(value, FakeTensor):
            return False
        if isinstance(value, torch.device) and value.type != "cpu":
            return False
    return True


def _one(dtype: torch.dtype) -> bool | int | float:
    """Value that every element seems to have; False, so that no check finds something wrong."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def install(recorder: Recorder) -> DeviceMode:
    """Prepare torch for fake tensors of the device; returns the mode to enter."""
    fake_tensor.init_gpu_context = lambda *_: None  # type: ignore[assignment]

    def tolist(tensor: FakeTensor) -> Any:
        if tensor.device.type == "cuda":
            recorder.device_read("tolist")
        return _ones(tensor)

    def to_numpy(tensor: FakeTensor, **_: Any) -> Any:
        raise TypeError("numpy() of a fake tensor: the rehearsal has no data to give")

    FakeTensor.tolist = tolist  # type: ignore[method-assign,assignment]
    FakeTensor.numpy = to_numpy  # type: ignore[method-assign,assignment]
    torch.utils.swap_tensors = _swap_tensors
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor.to(DEVICE)  # type: ignore[method-assign]
    # AdamW takes its foreach kernels on CUDA for exactly these types.
    types: list[Any] = importlib.import_module("torch.optim.optimizer")._foreach_supported_types
    if FakeTensor not in types:
        types.append(FakeTensor)
    return DeviceMode(recorder)


def _ones(tensor: FakeTensor) -> Any:
    def build(shape: tuple[int, ...]) -> Any:
        return [build(shape[1:]) for _ in range(shape[0])] if shape else _one(tensor.dtype)

    return build(tuple(tensor.shape))


def _swap_tensors(first: Any, second: Any) -> None:
    """Exchange two tensors as Module.to() does; torch refuses fake ones with weak references."""
    kept, new = dict(first.__dict__), dict(second.__dict__)
    classes = first.__class__, second.__class__
    torch._C._swap_tensor_impl(first, second)
    first.__class__, second.__class__ = classes[1], classes[0]
    first.__dict__.clear()
    first.__dict__.update({**kept, **new})
    second.__dict__.clear()
    second.__dict__.update(kept)
