"""Kernels of a GPU as shapes: the same outputs, the same tensors kept for backward, no in-between.

A CPU build of torch composes these of smaller operations, whose results would count as memory.
Calls of Triton kernels and of flash attention are checked against what they need and then do
nothing.
"""

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_croc.rehearsal.fake_tensors import is_on_device
from megatron_croc.rehearsal.recorder import Recorder

_HALF = (torch.bfloat16, torch.float16)


class _RmsNorm(torch.autograd.Function):
    """RMSNorm that keeps its input, the weight and one float32 per row, as the CUDA kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:  # type: ignore[override]
        rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def install(recorder: Recorder) -> None:
    """Replace the kernels. Call it before the model's modules are imported."""
    torch._dynamo.config.disable = True  # compiled fusions run as they are written
    real_norm, real_attention = functional.rms_norm, functional.scaled_dot_product_attention

    @functools.wraps(real_norm)
    def rms_norm(
        x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if not is_on_device(x):
            return real_norm(x, shape, weight, eps)
        return _RmsNorm.apply(x, weight)  # type: ignore[return-value]

    @functools.wraps(real_attention)
    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                  dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                  **others: Any) -> Tensor:  # fmt: skip
        is_flash = is_on_device(query) and attn_mask is None and query.dtype in _HALF
        if not is_flash or query.shape[-1] % 8:
            return real_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others
            )
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]

    functional.rms_norm = rms_norm  # type: ignore[assignment]
    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    if importlib.util.find_spec("triton") is not None:
        kernel_type: Any = importlib.import_module("triton.runtime.jit").JITFunction
        kernel_type.__getitem__ = lambda kernel, grid: functools.partial(
            _launch, recorder, kernel, grid
        )


def replace_fused_swiglu() -> None:
    """Megatron's fused SwiGLU as one kernel each way, as inductor writes it on a GPU."""
    fusion: Any = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
    fusion.swiglu = lambda y: y.new_empty((*y.shape[:-1], y.shape[-1] // 2))
    fusion.swiglu_back = lambda _, y: torch.empty_like(y)


class _Flex(torch.autograd.Function):
    """FlexAttention that keeps its inputs, its output and the log of the sums."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def replace_flex(recorder: Recorder) -> None:
    """FlexAttention, which needs the compiler, as one kernel each way."""
    flex: Any = importlib.import_module("megatron_croc.ops.attention.flex")

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        # Half of all pairs: those of a causal mask of one sample.
        flops = 2.0 * query.numel() * key.shape[-2]
        recorder.compute("flex_attention", flops=flops, moved=0.0)
        return _Flex.apply(query, key, value)  # type: ignore[return-value]

    flex._compiled = lambda: attention


def _launch(recorder: Recorder, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
    """One launch of a Triton kernel; the caller has allocated what it writes."""
    name = getattr(kernel, "__name__", str(kernel))
    moved = sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))
    recorder.compute(f"triton.{name}", flops=0.0, moved=moved)
    for fault in triton_faults(kernel, grid, args, kwargs):
        recorder.fault(f"triton kernel {name}: {fault}")


def triton_faults(kernel: Any, grid: Any, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Reasons for which a launch would fail or read the wrong memory.

    A kernel reads a tensor by the strides that follow it among the arguments; a tensor without
    them must be contiguous.
    """
    faults: list[str] = []
    signature = inspect.signature(kernel.fn)
    options = {k: v for k, v in kwargs.items() if k in signature.parameters}
    try:
        bound = signature.bind(*args, **options).arguments
    except TypeError as error:
        return [f"its arguments do not fit: {error}"]
    if any(not isinstance(size, int) or not 0 < size < 2**31 for size in grid):
        faults.append(f"a grid of {tuple(grid)}; each side must lie between 1 and 2^31 - 1")
    values = list(bound.items())
    for number, (name, value) in enumerate(values):
        if isinstance(value, Tensor):
            if value.device.type != "cuda":
                faults.append(f"{name} is on {value.device}; it must be on the GPU")
            after = [v for _, v in values[number + 1 : number + 1 + value.dim()]]
            has_strides = all(isinstance(v, int) for v in after) and after == [*value.stride()]
            if not has_strides and not value.is_contiguous():
                faults.append(f"{name} {list(value.shape)} is not contiguous; call .contiguous()")
        elif name.endswith(("BLOCK", "NUM_PADDED")) and (value < 1 or value & (value - 1)):
            faults.append(f"{name} = {value}; it must be a power of two")
    return faults


def flash_flops(name: str, args: tuple) -> float | None:
    """Operations of a call of torch's flash attention; None of another operation.

    A causal call computes the pairs that are visible: half of them if queries and keys are as many.
    """
    if "flash_attention" not in name:
        return None
    is_backward = "backward" in name
    query, key = args[1:3] if is_backward else args[:2]
    products = 5 if is_backward else 2  # backward computes the scores again
    if name.startswith("_scaled_dot_product"):  # [B, H, S, d]
        batch, heads, length, dim = query.shape
        return products * 2.0 * batch * heads * length * key.shape[2] * dim
    boundaries: list[Any] = [
        getattr(b, "host_value", None) for b in (args[6:8] if is_backward else args[3:5])
    ]
    if any(b is None for b in boundaries):
        pairs = float(query.shape[0]) * key.shape[0] / 2
    else:
        queries, keys = (b.diff().double() for b in boundaries)
        last = queries.minimum(keys)
        # Aligned at the end: the last query sees all keys.
        pairs = float((last * (keys - last) + last * (last + 1) / 2).sum())
    return products * 2.0 * pairs * query.shape[-2] * query.shape[-1]


def flash_faults(name: str, args: tuple) -> list[str]:
    """Reasons for which torch's flash attention would refuse a call of `aten._flash_attention_*`.

    Its inputs are [positions, heads, d] with int32 segment boundaries.
    """
    is_backward = "backward" in name
    query, key, value = args[1:4] if is_backward else args[:3]
    boundaries = args[6:8] if is_backward else args[3:5]
    faults: list[str] = []
    if query.dtype not in _HALF or {key.dtype, value.dtype} != {query.dtype}:
        dtypes = [str(t.dtype).removeprefix("torch.") for t in (query, key, value)]
        faults.append(f"query, key and value are {', '.join(dtypes)}; all bfloat16 or float16")
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        faults.append(f"head dim {query.shape[-1]}; it must be a multiple of 8 up to 256")
    if query.shape[-2] % key.shape[-2]:
        faults.append(f"{query.shape[-2]} query heads on {key.shape[-2]} key heads; must divide")
    for tensor in (query, key, value):
        if tensor.stride(-1) != 1:
            faults.append("the last dimension is not contiguous; call .contiguous()")
    for boundary in boundaries:
        if boundary is not None and (
            boundary.dtype != torch.int32 or not boundary.is_contiguous()
            or boundary.device != query.device
        ):  # fmt: skip
            found = f"{str(boundary.dtype).removeprefix('torch.')} on {boundary.device}"
            faults.append(f"segment boundaries are {found}; contiguous int32 on the GPU")
    return faults
