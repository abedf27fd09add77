"""Everything that differs between CUDA and CPU.

megatron-core calls torch.cuda in many places. Without CUDA, `install_cpu_stand_in` replaces the few
functions that need it by CPU ones, so that the same schedules, layers, optimizer and checkpoints
run on CPU and gloo. Each replacement is needed by megatron-core 0.16 or 0.19; its comment names the
module. With CUDA nothing is replaced. `compute_on_cpu` does the same on a machine with a GPU.

Import transformers before the replacement: it queries torch.cuda during its import.
"""

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_croc.errors import ConfigError

_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)

_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}

_installed = False
"""State of the whole process, listed in docs/design.md."""


def has_cuda() -> bool:
    """Return True if this process computes on a CUDA device."""
    return torch.cuda.is_available() and not _installed


def distributed_backend() -> str:
    """Return the backend of torch.distributed for the current device."""
    return "nccl" if has_cuda() else "gloo"


def current_device() -> torch.device:
    """Return the device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Allocate uninitialised CPU memory; pinned with CUDA, so that copies are asynchronous."""
    return torch.empty(shape, dtype=dtype, pin_memory=has_cuda())


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy host memory to the current device, asynchronously."""
    if not has_cuda():
        return tensor
    return tensor.pin_memory().to(current_device(), non_blocking=True)


def forbid_tf32() -> None:
    """Compute float32 products in float32: TF32 has 10 bits and changes 3 to 7 % of the matches.

    Some images allow TF32 by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, and cuDNN does so by default.
    Products in bfloat16 do not change.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def require_determinism() -> None:
    """Let every operation of this process give the same bits each time, or fail.

    torch chooses deterministic kernels (and raises where it has none), Transformer Engine and
    cuBLAS read variables of the environment, and NCCL keeps one algorithm, so that sums over ranks
    have one order. A variable that is set already stays. To be called before the first matrix
    product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def set_local_device(local_rank: int) -> None:
    """Select the GPU of this process; nothing on a CPU."""
    if has_cuda():
        torch.cuda.set_device(local_rank)


def synchronize() -> None:
    """Wait until the device has finished all queued work."""
    if has_cuda():
        torch.cuda.synchronize()


def device_name() -> str:
    """Return the name of the accelerator, as in the table of peak FLOP/s."""
    return torch.cuda.get_device_name() if has_cuda() else "cpu"


def describe_gpus() -> list[str]:
    """Return one line per visible GPU: name, memory, compute capability."""
    if not has_cuda():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for p in found]


def describe_cuda() -> str:
    """Return the versions of CUDA, cuDNN and NCCL of this torch."""
    from torch.cuda import nccl

    nccl_version = ".".join(map(str, nccl.version()))
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl_version}"


def max_memory_allocated() -> int:
    """Return the peak of device memory in bytes since the start or the reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if has_cuda() else 0


def reset_peak_memory() -> None:
    """Give unused memory back to the device, and count its peak from here."""
    if has_cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def moment() -> Any:
    """Return the present moment: an event on the compute stream, or host seconds on a CPU."""
    if not has_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Return the seconds from one `moment` to a later one; waits for the later one."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000.0


def record_memory_history() -> bool:
    """Begin to record every allocation with its stack; False on a CPU, which has no such record."""
    if has_cuda():
        torch.cuda.memory._record_memory_history()
    return has_cuda()


def write_memory_history(path: Path) -> None:
    """Write the record of allocations (for pytorch.org/memory_viz), and stop it."""
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def manual_generator(seed: int) -> torch.Generator:
    """Return a new generator on the current device, seeded with `seed`."""
    return torch.Generator(device=current_device()).manual_seed(seed)


class SideWork:
    """Work on a side stream; on a CPU it is done immediately."""

    def __init__(self) -> None:
        """Start without anything to wait for."""
        self._copied: torch.Event | None = None
        self._done: torch.Event | None = None

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy to host memory, complete after `wait_on_host`; on a CPU the tensor itself."""
        if not tensor.is_cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        # An event of the copy alone: a thread may need `host` before the block of `beside` ends.
        self._copied = torch.cuda.current_stream().record_event()
        return host

    def wait_on_host(self) -> None:
        """Make this thread wait for the last `to_host`."""
        if self._copied is not None:
            self._copied.synchronize()

    def wait_on_device(self) -> None:
        """Make the main stream, not this thread, wait for the work."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)


@contextmanager
def beside(*, enabled: bool = True) -> Iterator[SideWork]:
    """Queue the work of the block on the side stream, after the present work of the main stream.

    Memory that the block allocates is reused by a later block only, which starts after the main
    stream has used it. Tensors of the main stream that the block reads must live until the block
    has been waited for.
    """
    work = SideWork()
    if not (enabled and has_cuda()):
        yield work
        return
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield work
        work._done = stream.record_event()


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def compute_on_cpu() -> None:
    """Compute on the CPU, on a machine with GPUs. Call it before megatron.core is imported.

    CUDA is hidden from all libraries from now on, also from Transformer Engine and transformers.

    Raises:
        ConfigError: this process uses a GPU already.
    """
    if torch.cuda.is_available() and not _installed:
        if torch.cuda.is_initialized():
            raise ConfigError("this process uses a GPU already; start a new one for the CPU")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for libraries that do not ask torch
        torch.cuda.is_available = lambda: False
        torch.cuda.device_count = lambda: 0
    install_cpu_stand_in()


def install_cpu_stand_in() -> None:
    """Make megatron-core run without CUDA. Call it before megatron.core is imported; idempotent."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    cpu = torch.device("cpu")
    cuda = torch.cuda

    # tensor_parallel/mappings, p2p_communication, param_and_grad_buffer allocate on this device.
    cuda.current_device = lambda: cpu  # type: ignore[assignment]
    # p2p_communication and the checkpoint writer wait for the device.
    cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    # param_and_grad_buffer (0.19) waits for CUDA graphs; there are none.
    cuda.current_stream = torch.cpu.current_stream  # type: ignore[assignment]

    # tensor_parallel/random saves named generator states; here those of the CPU generator.
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_rng_state(*_: object, **__: object) -> torch.Tensor:
        return torch.get_rng_state()

    cuda.manual_seed = manual_seed  # type: ignore[assignment]
    cuda.get_rng_state = get_rng_state  # type: ignore[assignment]
    cuda.random.get_rng_state = get_rng_state  # type: ignore[assignment]
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[assignment]

    # schedules, clip_grads, rope_utils: torch.zeros(..., device="cuda") and pin_memory=True.
    # Wrapping the functions costs nothing; a TorchFunctionMode costs 13-18 % of a step.
    # torch.device("meta") identifies the functions by identity; let it collect the real ones first.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name), cpu))

    # Tensor.cuda() and Module.cuda() do nothing.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    # distrib_optimizer, optimizer, clip_grads accept the type name "torch.cuda.FloatTensor" only.
    real_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        answer = real_type(self, *args, **kwargs)  # type: ignore[arg-type]
        return _TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    torch.Tensor.type = tensor_type  # type: ignore[assignment,method-assign]

    # tensor_parallel/random imported these two functions from torch.cuda by name.
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = get_rng_state  # type: ignore[assignment]
    megatron_random._set_cuda_rng_state = (  # type: ignore[assignment]
        lambda new_state, *_, **__: torch.set_rng_state(new_state)
    )


def _on_cpu(factory, cpu: torch.device):
    """Wrap `factory`: a CUDA device becomes the CPU, and memory is not pinned."""

    @functools.wraps(factory)
    def made_on_cpu(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = cpu
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return made_on_cpu


install_cpu_stand_in()
