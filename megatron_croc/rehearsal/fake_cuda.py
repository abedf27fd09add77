"""torch.cuda without a GPU: streams and events that are only recorded, properties of a chosen GPU.

The replacements hold for the whole process. Call `install` before megatron.core is imported.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils._device import _device_constructors

from megatron_croc.planning.gpus import Gpu
from megatron_croc.rehearsal.fake_tensors import DEVICE
from megatron_croc.rehearsal.recorder import Recorder

_CAPABILITY = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0)}
"""Compute capability by the planner's name of the GPU; others count as 9.0."""

_PINNED_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like")
"""Functions that pin host memory in C++, before a mode sees the call."""


class FakeStream:
    """A stream that is only a number."""

    recorder: Recorder
    made: ClassVar[list["FakeStream"]] = []
    """All streams of the process, by number."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Create the next stream."""
        self.number = len(FakeStream.made)
        self.cuda_stream, self.priority, self.device = self.number, 0, DEVICE
        self.stream_id, self.device_index = self.number, 0
        self.device_type = 1
        FakeStream.made.append(self)

    def wait_stream(self, other: "FakeStream") -> None:
        """All later work of this stream waits for the present work of `other`."""
        self.wait_event(other.record_event())

    def wait_event(self, event: "FakeEvent") -> None:
        """All later work of this stream waits for `event`."""
        self.recorder.stream_waits(self.number, event.number)

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        """Mark the present end of this stream."""
        event = event or FakeEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Keep the host waiting for this stream."""
        self.recorder.host_waits("Stream.synchronize", stream=self.number)

    def query(self) -> bool:
        """Return True: all work is done at once."""
        return True

    def __enter__(self) -> "FakeStream":
        """Make it the current stream, as torch.cuda.stream does."""
        self._before = self.recorder.stream
        self.recorder.stream = self.number
        return self

    def __exit__(self, *_: object) -> None:
        """Go back to the stream before."""
        self.recorder.stream = self._before


class FakeEvent:
    """A mark in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Create an event that marks nothing yet."""
        self.number: int | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        """Mark the present end of a stream, of the current one by default."""
        recorder = FakeStream.recorder
        self.number = recorder.record_event(recorder.stream if stream is None else stream.number)

    def wait(self, stream: FakeStream | None = None) -> None:
        """All later work of a stream waits for this event."""
        recorder = FakeStream.recorder
        recorder.stream_waits(recorder.stream if stream is None else stream.number, self.number)

    def query(self) -> bool:
        """Return True: all work is done at once."""
        return True

    def synchronize(self) -> None:
        """Keep the host waiting for this event."""
        FakeStream.recorder.host_waits("Event.synchronize", event=self.number)

    def elapsed_time(self, _: "FakeEvent") -> float:
        """Milliseconds, of no meaning."""
        return 1.0


class _FakeGenerator:
    """Generator of the device: fake kernels draw nothing."""

    def get_state(self) -> torch.Tensor:
        return torch.empty(16, dtype=torch.uint8)

    def set_state(self, _: torch.Tensor) -> None: ...

    def manual_seed(self, _: int) -> "_FakeGenerator":
        return self

    def initial_seed(self) -> int:
        return 0


def install(recorder: Recorder, gpu: Gpu) -> None:
    """Make torch.cuda describe one `gpu` that reports all it is asked to do to `recorder`."""
    FakeStream.recorder = recorder
    cuda: Any = torch.cuda
    main = FakeStream()

    def current_stream(*_: Any, **__: Any) -> FakeStream:
        return FakeStream.made[recorder.stream]

    @contextlib.contextmanager
    def stream_block(stream: FakeStream | None) -> Iterator[None]:
        with stream if stream is not None else contextlib.nullcontext():
            yield

    def set_stream(stream: FakeStream) -> None:
        recorder.stream = stream.number

    def state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(16, dtype=torch.uint8)

    major, minor = _CAPABILITY.get(gpu.name, (9, 0))
    properties = types.SimpleNamespace(
        name=gpu.name,
        total_memory=int(gpu.memory),
        major=major,
        minor=minor,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin=232448,
    )
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: call(),
        "init": lambda: None,
        "device_count": lambda: gpu.gpus_per_node,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda *_, **__: recorder.host_waits("torch.cuda.synchronize"),
        "get_device_capability": lambda *_: (major, minor),
        "get_device_name": lambda *_: gpu.name,
        "get_device_properties": lambda *_: properties,
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_stream": current_stream,
        "default_stream": lambda *_, **__: main,
        "stream": stream_block,
        "set_stream": set_stream,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_, **__: 0,
        "max_memory_allocated": lambda *_, **__: 0,
        "memory_reserved": lambda *_, **__: 0,
        "manual_seed": torch.default_generator.manual_seed,
        "get_rng_state": state,
        "set_rng_state": lambda *_, **__: None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.random.get_rng_state = state
    cuda.random.set_rng_state = answers["set_rng_state"]
    cuda.default_generators = (_FakeGenerator(),) * gpu.gpus_per_node
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    _unpin_factories()
    _make_generators_of_the_cpu()


def _unpin_factories() -> None:
    _device_constructors()  # torch.device("meta") identifies the functions by identity
    for name in _PINNED_FACTORIES:
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made


def _make_generators_of_the_cpu() -> None:
    real = torch.Generator

    class Generator(real):  # type: ignore[misc,valid-type]
        def __new__(cls, device: object = "cpu") -> Any:
            return real.__new__(cls, "cpu")  # type: ignore[call-arg]

    torch.Generator = Generator  # type: ignore[misc]
