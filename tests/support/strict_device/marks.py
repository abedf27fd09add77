"""Tensors are the device's or the host's, and what would wait or fail on a device is seen.

torch.device("cpu", 0) is the device here, plain "cpu" the host: both compute alike, yet
`.to(current_device())` copies, as on CUDA. A mark belongs to memory, so views share it; results of
operations inherit it. Memory of unknown origin (a checkpoint's, numpy's) is neither, and fits both.

Not seen: reads inside C++ that no operator shows (printing a tensor), functional collectives,
other streams than the one of `beside`, and threads not started by a ThreadPoolExecutor.
"""

import functools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_croc.parallel import device
from tests.support.strict_device.job import Job, describe, function, place
from tests.support.strict_device.streams import Copies, Stream, current_stream, memory

DEVICE = torch.device("cpu", 0)
HOST = torch.device("cpu")

_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense.default: "item",
    _aten.nonzero.default: "nonzero",
    _aten.bincount.default: "bincount",
    _aten.masked_select.default: "masked_select",
    _aten.equal.default: "equal",
    _aten._unique2.default: "unique",
    _aten.repeat_interleave.Tensor: "repeat_interleave",
}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_FACTORIES = (
    *device._FACTORIES,
    "as_tensor",
    "eye",
    "full_like",
    "linspace",
    "randint",
    "randperm",
)
_PLAIN = (Tensor, torch.nn.Parameter)
_ON_DEVICE = ("SideWork.", "beside")
"""Functions of parallel/device.py that take their CUDA path here."""


class Mark(NamedTuple):
    """Known facts about one piece of memory."""

    alive: StorageWeakRef
    device: torch.device
    stream: Stream | None
    """The side stream that computed it."""
    number: int
    place: str


class Marks:
    """The marks of one process."""

    def __init__(self, job: Job, copies: Copies) -> None:
        """Everything made before is of unknown origin."""
        self.job, self.copies = job, copies
        self._of: dict[int, Mark] = {}
        self._number = 0

    def get(self, tensor: Tensor) -> Mark | None:
        """The mark of the tensor's memory; None if its origin is unknown or it is on neither."""
        if not _is_plain(tensor):
            return None
        try:
            return self._of.get(memory(tensor))
        except (NotImplementedError, RuntimeError):  # a wrapper of functorch has no memory
            return None

    def is_device(self, tensor: Tensor) -> bool:
        """True when it would be in CUDA memory."""
        mark = self.get(tensor)
        return mark is not None and mark.device == DEVICE

    def is_host(self, tensor: Tensor) -> bool:
        """True when it is known to be in host memory."""
        mark = self.get(tensor)
        return mark is not None and mark.device == HOST

    def put(self, tensor: Tensor, where: torch.device, *, anew: bool = False) -> Tensor:
        """Mark the tensor's memory, unless it has a mark and `anew` is not set."""
        if not _is_plain(tensor):
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata in self._of and not anew:
            return tensor
        self._number += 1
        if self._number % 20000 == 0:
            self._of = {key: mark for key, mark in self._of.items() if not mark.alive.expired()}
        stream, at = current_stream(), ""
        if stream.is_main or where != DEVICE:
            stream = None
        else:
            stream.computed.add(self._number)
            at = place()
        self._of[storage._cdata] = Mark(StorageWeakRef(storage), where, stream, self._number, at)
        return tensor

    def count_read(self, operation: str) -> None:
        """The host waits for a value of the device."""
        self.job.report.host_reads[f"{operation} at {function()}"] += 1

    def check_ready(self, tensor: Tensor, operation: str) -> None:
        """A fault if the tensor's memory is still being filled."""
        if not _is_plain(tensor):
            return
        if copy := self.copies.pending.get(memory(tensor)):
            self.job.fault(f"{operation} at {place()} reads before it is there: {copy.name}")
        mark = self.get(tensor)
        if mark is None or mark.stream is None or mark.stream is current_stream():
            return
        if mark.number in mark.stream.computed:
            self.job.fault(
                f"{operation} at {place()} reads {describe(tensor)}, which a side stream "
                f"computes at {mark.place}, without waiting for it"
            )


class Watch(TorchDispatchMode):
    """Sees every operation of a thread, backward included."""

    supports_higher_order_operators = True

    def __init__(self, marks: Marks) -> None:
        """Watch for `marks`."""
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") != "aten":
            return func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        known = [(tensor, mark) for tensor in inputs if (mark := self.marks.get(tensor))]
        on_device = [tensor for tensor, mark in known if mark.device == DEVICE]
        on_host = [tensor for tensor, mark in known if mark.device == HOST and tensor.dim()]
        if not func.is_view and "empty" not in func._schema.name:
            for tensor in inputs:
                self.marks.check_ready(tensor, str(func))
            self._check_devices(func, args, on_device, on_host)
        if on_device:
            if func in _READS:
                self.marks.count_read(_READS[func])
            elif func in _INDEXING and not self._is_masked_fill(args):
                for index in tensors_in(args[1]):
                    if index.dtype == torch.bool and self.marks.is_device(index):
                        self.marks.count_read("boolean mask")
        result = func(*args, **kwargs)
        # device=cpu may come from C++, which knows no cpu:0: it says nothing.
        where = DEVICE if kwargs.get("device") == DEVICE or on_device else None
        where = where or (HOST if known else None)
        if where is not None:
            for tensor in tensors_in(result):
                self.marks.put(tensor, where)
        return result

    def _is_masked_fill(self, args: tuple) -> bool:
        """x[mask] = number: torch needs no positions for it."""
        return len(args) > 2 and args[2].numel() == 1 and not self.marks.is_device(args[2])

    def _check_devices(
        self, func: Any, args: tuple, on_device: list[Tensor], on_host: list[Tensor]
    ) -> None:
        if not on_device or not on_host or func is _aten.copy_.default:
            return
        if func in _INDEXING and self.marks.is_device(args[0]):
            return  # indices may be the host's
        self.marks.job.fault(
            f"{func} at {place()} mixes the device's {describe(on_device[0])} with the host's "
            f"{describe(on_host[0])}"
        )


def _is_plain(tensor: Tensor) -> bool:
    """True when it has memory of its own here; a ShardedTensor of checkpoints has none."""
    return type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout == torch.strided


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def install_marks(marks: Marks) -> None:
    """Let factories, `.to`, `.cuda`, `.cpu` and the rest tell device and host apart."""
    torch.cuda.current_device = lambda: DEVICE  # type: ignore[assignment,return-value]
    # By its code: other modules hold the function itself.
    device.current_device.__code__ = (lambda: torch.device("cpu", 0)).__code__
    device.to_device.__code__ = (lambda tensor: tensor.to(torch.device("cpu", 0))).__code__
    real_has_cuda = device.has_cuda

    def has_cuda() -> bool:
        caller = sys._getframe(1).f_code.co_qualname
        return caller.startswith(_ON_DEVICE) or real_has_cuda()

    device.has_cuda = has_cuda
    for name in _FACTORIES:
        setattr(torch, name, _marking(marks, name, getattr(torch, name)))
    for name in ("from_numpy", "frombuffer"):
        setattr(torch, name, _marking(marks, name, getattr(torch, name)))

    submit = ThreadPoolExecutor.submit

    def watched(pool: Any, task: Any, /, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            with Watch(marks):
                return task(*args, **kwargs)

        return submit(pool, run)

    ThreadPoolExecutor.submit = watched  # type: ignore[method-assign]
    _install_methods(marks)


def _install_methods(marks: Marks) -> None:
    cls: Any = torch.Tensor
    real_to, real_copy, real_tolist, real_numpy = cls.to, cls.copy_, cls.tolist, cls.numpy
    real_device, real_is_cuda = cls.device, cls.is_cuda

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            return to(self, args[0].device, args[0].dtype, *args[1:], **kwargs)
        copy = kwargs.pop("copy", False)
        if len(args) == 4 or (len(args) == 3 and isinstance(args[0], torch.dtype)):
            *args, copy = args  # type: ignore[assignment]
        where, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        more = {"dtype": dtype or self.dtype, "copy": copy}
        if layout is not None:
            more["memory_format"] = layout
        if where is not None and where.type == "cuda":
            where = DEVICE
        if where is None or where.type != "cpu" or not self.is_cpu:
            return real_to(self, *([] if where is None else [where]), **more)
        if where == DEVICE:
            here = marks.is_device(self)
            return (
                real_to(self, **more) if here else marks.put(real_to(self, DEVICE, **more), DEVICE)
            )
        if not marks.is_device(self):
            return real_to(self, **more)
        if non_blocking and marks.job.options.copy_ms:
            into = torch.empty(self.shape, dtype=more["dtype"])
            return marks.copies.begin(into, self)
        marks.count_read("cpu")
        return marks.put(real_to(self, **{**more, "copy": True}), HOST, anew=True)

    def cuda(self: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.is_meta:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        return to(self, DEVICE)

    def copy_(self: Tensor, source: Any, non_blocking: bool = False) -> Tensor:
        if isinstance(source, Tensor) and marks.is_host(self) and marks.is_device(source):
            if non_blocking and marks.job.options.copy_ms:
                return marks.copies.begin(self, source)
            marks.count_read("copy_ to the host")
        return real_copy(self, source, non_blocking)

    def tolist(self: Tensor) -> Any:
        marks.check_ready(self, "tolist")
        if marks.is_device(self):
            marks.count_read("tolist")
        return real_tolist(self)

    def numpy(self: Tensor, **kwargs: Any) -> Any:
        marks.check_ready(self, "numpy")
        if marks.is_device(self):
            marks.job.fault(f"numpy() of the device's {describe(self)} at {place()}")
        return real_numpy(self, **kwargs)

    def is_cuda(self: Tensor) -> bool:
        caller = sys._getframe(1).f_code.co_qualname
        return _attribute(self, real_is_cuda) or (
            caller.startswith(_ON_DEVICE) and marks.is_device(self)
        )

    def where(self: Tensor) -> torch.device:
        return DEVICE if marks.is_device(self) else _attribute(self, real_device)

    cls.to, cls.cuda, cls.cpu, cls.copy_ = to, cuda, lambda self, *_, **__: to(self, "cpu"), copy_
    cls.tolist, cls.numpy = tolist, numpy
    cls.device = property(where)
    cls.is_cuda = property(is_cuda)


def _attribute(tensor: Tensor, real: Any) -> Any:
    """A tensor's attribute as it was before it was replaced."""
    if type(tensor) in _PLAIN:
        return real.__get__(tensor)
    # torch would pass a subclass our property, which ShardedTensor does not know.
    kind = type(tensor)
    return kind.__torch_function__(real.__get__, (kind,), (tensor,), {})


def _marking(marks: Marks, name: str, factory: Any) -> Any:
    """`factory` with its result marked by the device it was asked for."""
    makes_new = not name.endswith("_like")

    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        where = kwargs.get("device")
        if where is not None and str(where).startswith("cuda"):
            where = kwargs["device"] = DEVICE
        if name in ("tensor", "as_tensor"):
            for tensor in tensors_in(args[0] if isinstance(args[0], list | tuple) else ()):
                if marks.is_device(tensor):
                    marks.count_read("torch.tensor of a tensor")
        tensor = factory(*args, **kwargs)
        if where == DEVICE:
            marks.put(tensor, DEVICE)
        elif makes_new and not (name == "as_tensor" and isinstance(args[0], Tensor)):
            marks.put(tensor, HOST)
        return tensor

    return made
