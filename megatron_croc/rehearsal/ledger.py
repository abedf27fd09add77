"""Memory of the device by purpose, and operations by kind, from every operation that runs.

A storage counts from the first operation that sees it until it is freed, rounded up to the 512
bytes of torch's allocator. Its purpose is fixed when it appears:

    weights, gradients, optimizer    known once the training state is built (`name_storages`)
    activations of a part            made while a module of that part computes forward
    logits                           made by the loss of the output layer
    temporary                        made by backward, by the update, or by a module that still runs
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_croc.rehearsal.fake_tensors import device_tensors
from megatron_croc.rehearsal.kernels import flash_faults, flash_flops
from megatron_croc.rehearsal.places import place
from megatron_croc.rehearsal.recorder import Recorder

BLOCK = 512
"""Bytes to which torch's CUDA allocator rounds."""

TEMPORARY = "temporary"


@dataclass(kw_only=True)
class Peak:
    """The highest memory of one phase."""

    total: int = 0
    """Bytes."""

    parts: dict[str, int] = field(default_factory=dict)
    """Bytes by purpose, at that moment."""

    place: str = ""
    """Place of the operation that reached it."""

    largest: list[tuple[str, int]] = field(default_factory=list)
    """(purpose and operation, bytes) of the largest groups of storages."""


@dataclass
class _Held:
    size: int
    purpose: str
    operation: str
    reference: Any


class Ledger(TorchDispatchMode):
    """Watches every operation on the device."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        """Nothing is allocated yet."""
        super().__init__()
        self.recorder = recorder
        self.now = 0
        self.peaks: dict[str, Peak] = {}
        self.num_operations = 0
        self._held: dict[int, _Held] = {}
        self._running: list[str] = []
        self._due = False
        self._sums: Counter[tuple[str, str]] = Counter()
        self._logit_columns = 0
        self._recent_peak = 0
        recorder.part, recorder.memory = self.running_part, self._recent_memory

    def running_part(self) -> str:
        """Part of the model whose forward pass runs; empty in none."""
        return self._running[-1] if self._running else ""

    def _recent_memory(self) -> tuple[int, int]:
        peak, self._recent_peak = self._recent_peak, self.now
        return self.now, peak

    def name_storages(self, purpose: str, tensors: Iterable[Tensor]) -> None:
        """Give storages that exist their purpose."""
        for tensor in tensors:
            held = self._held.get(tensor.untyped_storage()._cdata)
            if held is not None:
                self._sums[held.purpose, held.operation] -= held.size
                held.purpose = purpose
                self._sums[held.purpose, held.operation] += held.size

    def follow(self, model: nn.Module, parts: Iterable[str], *, logit_columns: int) -> None:
        """Tell the parts of a model chunk apart by its modules.

        Args:
            model: chunk without its DDP wrapper.
            parts: names of its children.
            logit_columns: width of the logits on this rank.
        """
        self._logit_columns = logit_columns
        for name in parts:
            part = getattr(model, name, None)
            if not isinstance(part, nn.Module):
                continue
            self._hook(part, name)
            for inner_name, inner in part.named_children():
                if name == "language_model":
                    self._hook(inner, f"{name}.{inner_name}")

    def _hook(self, module: nn.Module, name: str) -> None:
        def enter(*_: Any) -> None:
            self._running.append(name)

        def leave(*_: Any) -> None:
            if name in self._running:
                while self._running.pop() != name:
                    pass

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def start_phase(self, phase: str) -> Peak:
        """Begin a phase; its peak begins at the present memory."""
        self._snapshot()
        self.recorder.settle()
        self.recorder.phase = phase
        self.recorder.mark()
        peak = self.peaks.setdefault(phase, Peak())
        self._due = self.now > peak.total
        peak.total = max(peak.total, self.now)
        return peak

    def end(self) -> None:
        """Complete the record of the last phase."""
        self._snapshot()

    def held_by_purpose(self) -> dict[str, int]:
        """Bytes by purpose now."""
        return _by_purpose(self._sums)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and record what it allocates and computes."""
        kwargs = kwargs or {}
        if getattr(func, "namespace", "aten") != "aten":  # a question about a tensor: prim::device
            return func(*args, **kwargs)
        name = _name(func)
        if name.startswith("_flash_attention_"):
            for fault in flash_faults(name, args):
                self.recorder.fault(f"flash attention: {fault}")
        out = func(*args, **kwargs)
        self.num_operations += 1
        moved = 0
        on_device = False
        counted = (args, kwargs) if name in _ONLY_WRITE else (args, kwargs, out)
        for tensor in device_tensors(counted):
            on_device = True
            moved += tensor.numel() * tensor.element_size()
            self._see(tensor, func)
        if on_device and name not in _FREE:
            self.recorder.compute(
                name,
                flops=self._flops(func, args, kwargs, out),
                moved=moved,
            )
        return out

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        if (flops := flash_flops(_name(func), args)) is not None:
            return flops
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        return 0.0 if count is None else float(count(*args, **kwargs, out_val=out))

    def _see(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        held = self._held.get(key)
        if held is not None:
            if size != held.size:  # resize_()
                self._add(held, size - held.size)
                held.size = size
            return
        held = _Held(
            size,
            self._purpose(tensor),
            _name(func),
            weakref.ref(storage, lambda _, key=key: self._free(key)),
        )
        self._held[key] = held
        self._add(held, size)

    def _purpose(self, tensor: Tensor) -> str:
        if self.recorder.phase == "build":
            return "building"
        part = self._running[-1] if self._running else None
        may_be_logits = part in (None, "language_model", "language_model.output_layer")
        if may_be_logits and tensor.dim() and tensor.shape[-1] == self._logit_columns:
            return "logits"
        in_backward = torch._C._current_graph_task_id() != -1
        if part is not None:
            return f"recomputed, {part}" if in_backward else f"activations, {part}"
        return TEMPORARY

    def _add(self, held: _Held, size: int) -> None:
        if size < 0:
            self._snapshot()
        self.now += size
        self._sums[held.purpose, held.operation] += size
        self._recent_peak = max(self._recent_peak, self.now)
        peak = self.peaks[self.recorder.phase]
        if self.now > peak.total:
            peak.total, self._due = self.now, True
            peak.place = ""

    def _free(self, key: int) -> None:
        held = self._held.pop(key)
        self._add(held, -held.size)
        self.recorder.release(key)

    def _snapshot(self) -> None:
        """Keep the purposes at the peak, before anything is freed after it."""
        if not self._due:
            return
        self._due = False
        peak = self.peaks[self.recorder.phase]
        peak.parts, peak.place = _by_purpose(self._sums), place()
        largest = self._sums.most_common(12)
        peak.largest = [(f"{purpose}: {name}", size) for (purpose, name), size in largest]


def _by_purpose(sums: Counter[tuple[str, str]]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for (purpose, _), size in sums.items():
        totals[purpose] += size
    return {purpose: size for purpose, size in totals.most_common() if size}


_ONLY_WRITE = {"copy_", "fill_", "normal_", "uniform_", "zero_"}
"""Operations that write a tensor in place without reading it: they move its bytes once."""

_FREE = {
    "view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze",
    "squeeze", "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided", "chunk", "unflatten",
    "set_", "resize_", "lift_fresh", "_local_scalar_dense", "_pin_memory",
}  # fmt: skip
"""Operations that launch no kernel."""


def _name(func: Any) -> str:
    """Name of an operation, without aten's prefix."""
    schema = getattr(func, "_schema", None)
    return str(func) if schema is None else schema.name.removeprefix("aten::")
