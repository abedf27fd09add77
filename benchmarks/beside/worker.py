"""A process that takes training steps when told to: one line of JSON in, one out.

    {"step": 7, "dropout": true}               -> {"cpu": s, "wall": s, "loss": x, ...}
    {"step": 8, "dropout": true, "parts": true} -> the same, with FLOPs and CPU time by operation

Both the released code's process and ours run `serve` with a `take_step` of their own.
"""

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from beside.case import Inputs, Size, make_inputs, size_from_json

TakeStep = Callable[[Inputs, bool], dict[str, float]]
"""Forward, backward and update on some inputs, with or without dropout; returns the losses."""

FAMILIES = {
    "views": (
        *("view", "t", "transpose", "slice", "select", "expand", "permute", "unsqueeze"),
        *("squeeze", "detach", "alias", "split", "as_strided", "unbind", "unsafe_view"),
    ),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "convolution", "addmv", "mv"),
    "attention": ("scaled_dot_product",),
    "norms": ("layer_norm", "rms_norm", "pow", "rsqrt", "mean", "linalg_vector_norm", "norm"),
    "softmax, cross entropy": ("softmax", "nll_loss", "logsumexp", "exp", "log", "gather"),
    "activations": ("silu", "gelu", "sigmoid", "tanh", "dropout", "bernoulli"),
    "collectives": ("c10d",),
    "optimizer": ("addcdiv", "addcmul", "lerp", "sqrt", "foreach", "fused_adam"),
    "copies": ("copy", "clone", "cat", "contiguous", "stack", "zero", "fill", "full", "empty"),
    "indexing": ("index", "embedding", "masked", "where", "scatter", "nonzero"),
    "distances": ("cdist", "euclidean", "argmin"),
}
"""Words in an operation's name, first match wins; the rest is element-wise. Short words and views
must be the whole name."""


def family(name: str) -> str:
    """Row of the breakdown that an operation belongs to."""
    for row, words in FAMILIES.items():
        for word in words:
            if name == word or (row != "views" and len(word) > 4 and word in name):
                return row
    return "element-wise"


class OperationClock(TorchDispatchMode):
    """CPU seconds inside every operation, by family."""

    def __init__(self) -> None:
        """Start with no seconds."""
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operation between two reads of the process's clock."""
        namespace, _, name = func._schema.name.partition("::")
        row = "collectives" if namespace == "c10d" else family(name.strip("_"))
        started = time.process_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[row] += time.process_time() - started
        self.calls[row] += 1
        return result


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return sdpa_backward_flop_count(grad, query, key, value)


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""The CPU's kernel, which torch's counter does not know."""


def _measure(take: Callable[[], dict[str, float]]) -> dict[str, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    found = take()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, **found}


def _peak_mib() -> float:
    """Peak memory of the GPU's tensors, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure_parts(take: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Operations of one step, then FLOPs of the next one (both see the same inputs)."""
    with OperationClock() as clock:
        found = _measure(take)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        take()
    return {
        **found,
        "operations": dict(clock.seconds),
        "calls": dict(clock.calls),
        "gflop": counter.get_total_flops() / 1e9,
    }


def serve(build: Callable[[Size, dict[str, Any]], TakeStep]) -> None:
    """Read the order to build from the first line, then take a step for every further line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to the standard output
    sys.stdout = sys.stderr
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    order = json.loads(sys.stdin.readline())
    size = size_from_json(order["size"])
    take_step = build(size, order)
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        versions["device"] = torch.cuda.get_device_name()
    if "transformers" in sys.modules:
        versions["transformers"] = sys.modules["transformers"].__version__
    print(json.dumps(versions), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        inputs = make_inputs(size, request["step"], order["num_batches"])
        measure = _measure_parts if request.get("parts") else _measure
        reply = measure(partial(take_step, inputs, request["dropout"]))
        reply["peak_mib"] = _peak_mib()
        print(json.dumps(reply), file=replies, flush=True)
