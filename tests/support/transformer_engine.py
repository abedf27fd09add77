"""Transformer Engine's own Python on a CPU: the package of a release over a made-up extension.

`install` comes before megatron-core is imported, so in a process of its own (`spawned`). What is
asked of the extension and not written here answers with a mock, which any computation chokes on.
"""

import enum
import math
import os
import re
import sys
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

BUILD = Path(__file__).resolve().parents[2] / "build" / "libraries"
VERSIONS = ("2.8.0", "2.20.2")
"""The ends of the known range (megatron_croc/libraries.py), as fetch_libraries.sh fetches them."""

_FP8_TENSORS = {
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT "
    "GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
}

spawned = get_context("spawn")
"""Processes that have imported nothing yet."""


def install(version: str) -> None:
    """Make `import transformer_engine` give that release's Python."""
    assert "megatron.core" not in sys.modules, "megatron-core has already looked for it"
    import torch
    import torch._dynamo  # asks for modules that are mocks below
    import transformers  # noqa: F401 - looks at torch.cuda, which stands in for a GPU soon

    folder = BUILD / f"transformer_engine-{version}"
    sys.path.insert(0, str(folder))
    for unused in ("onnx", "onnxscript", "einops"):  # of its exporter and its attention
        sys.modules.setdefault(unused, MagicMock())
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: load no library of CUDA
    torch.cuda.Stream = MagicMock
    torch.cuda.stream = torch.cuda.device = lambda _: nullcontext()
    torch.cuda.nvtx = MagicMock()
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="none"
    )
    sys.modules["transformer_engine_torch"] = _extension(folder / "transformer_engine" / "pytorch")

    # As its __init__ does, which would also look for the extension's shared object.
    package = ModuleType("transformer_engine")
    package.__path__ = [str(folder / "transformer_engine")]  # type: ignore[attr-defined]
    package.__version__ = version  # type: ignore[attr-defined]
    sys.modules["transformer_engine"] = package
    import transformer_engine.common as common

    common.load_framework_extension = lambda _: None
    package.common = common  # type: ignore[attr-defined]
    import transformer_engine.pytorch as pytorch

    # It imports * from the extension, and finds only what is written here.
    extension = sys.modules["transformer_engine_torch"]
    pytorch.cpp_extensions.__getattr__ = extension.__getattr__
    package.pytorch = pytorch  # type: ignore[attr-defined]
    import megatron_croc.model.transformer_engine as ours

    ours.te_unsupported_reason = lambda: None  # there is no GPU, which is all that is wrong
    torch.cuda.is_available = lambda: True  # its layers ask this, and their inputs where they are
    torch.Tensor.is_cuda = property(
        lambda _: sys._getframe(1).f_code.co_filename.startswith(str(folder))
    )


def _extension(python: Path) -> ModuleType:
    module = ModuleType("transformer_engine_torch")
    unknown = MagicMock(name="transformer_engine_torch")

    def answer(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(module, name, getattr(unknown, name))
        return getattr(module, name)

    module.__getattr__ = answer  # type: ignore[method-assign]
    for name, members in (_FP8_TENSORS | _mirrored_enums(python)).items():
        setattr(module, name, enum.IntEnum(name, members, start=0))
    for function in (
        *(rmsnorm_fwd, layernorm_fwd, generic_gemm),
        *(multi_tensor_adam, multi_tensor_l2norm, multi_tensor_scale),
    ):
        setattr(module, function.__name__, function)
    return module


def _mirrored_enums(python: Path) -> dict[str, str]:
    """Enums of the extension that the package repeats and compares at import (not in 2.8)."""
    found: dict[str, str] = {}
    for file in ("constants.py", "cpp_extensions/fused_attn.py"):
        text = (python / file).read_text()
        for name, member in re.findall(r"= int\((?:tex\.)?(\w+)\.(\w+)\)", text):
            found[name] = f"{found.get(name, '')} {member}"
    return found


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """RMSNorm as megatron_croc.model.norm computes it."""
    from torch.nn import functional

    assert out is None and quantizer is None and not zero_centered
    return functional.rms_norm(x, weight.shape, weight, eps), None, x[..., 0].float()


def layernorm_fwd(x, weight, bias, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """LayerNorm, its mean and its deviation (neither is read without a backward pass)."""
    from torch.nn import functional

    assert out is None and quantizer is None and not zero_centered
    return functional.layer_norm(x, weight.shape, weight, bias, eps), x[..., 0], x[..., 0]


def generic_gemm(a, transa, b, transb, out, quantizer, dtype, bias, *_, **__):
    """A linear layer's forward pass; cuBLAS counts columns first, so A is the weight."""
    from torch.nn import functional

    assert (transa, transb, out, quantizer) == (True, False, None, None)
    bias = None if bias is None or bias.numel() == 0 else bias
    return functional.linear(b, a, bias), None, None, None


def multi_tensor_adam(
    chunk, overflow, lists, lr, beta1, beta2, eps, step, adam_w, corrected, decay, *_
):
    """AdamW on lists of gradients, parameters and both moments."""
    assert adam_w and corrected
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for grad, parameter, mean, square in zip(*lists, strict=True):
        parameter.mul_(1 - lr * decay)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        deviation = (square.sqrt() / math.sqrt(correction2)).add_(eps)
        parameter.addcdiv_(mean, deviation, value=-lr / correction1)


def multi_tensor_l2norm(chunk, overflow, lists, per_tensor=False, *_):
    """Norm over all tensors."""
    import torch

    return torch.nn.utils.get_total_norm(lists[0]).reshape(1), None


def multi_tensor_scale(chunk, overflow, lists, scale):
    """Multiples of tensors, into others."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
