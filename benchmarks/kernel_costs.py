"""Table of costs for `croc rehearse --costs`: seconds of kernels, collectives and messages here.

    python benchmarks/kernel_costs.py --out runs/costs                           # one device
    torchrun --nproc-per-node 8 benchmarks/kernel_costs.py --out runs/costs      # and its links

Each kind is timed at several sizes, and a line is laid through the times: `each` seconds for a call
and so many for each operation or byte (least squares of the relative error, nothing below 0). With
several processes collectives are timed over all of them (`all_reduce/8`), and messages between the
first two; with one, links have the rates of the GPU's data sheet, and `hardware` says so. Matrix
products and attention are bfloat16 on a GPU; on a CPU they are float32 and small, which shows that
the script runs. The form of the table is in megatron_croc/rehearsal/replay/costs.py.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls
from torch.nn.functional import scaled_dot_product_attention, silu

from megatron_croc.atomic_files import write_atomically
from megatron_croc.parallel.device import (
    current_device,
    device_name,
    distributed_backend,
    forbid_tf32,
    has_cuda,
    set_local_device,
    synchronize,
)
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.planning.step_time import LATENCY

Line = dict[str, float]
"""`each`, and `per_flop` or `per_byte`."""


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, without the launch: many are queued, and waited for once."""
    call()
    synchronize()
    found = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        found.append((time.perf_counter() - started) / repeats)
    return statistics.median(found)


def line(sizes: list[float], seconds: list[float], name: str) -> Line:
    """Lay each + size x rate through the times; every point counts by its relative error."""
    x, y = np.array(sizes), np.array(seconds)
    scale = x.max()
    matrix = np.stack([1 / y, x / scale / y], axis=1)
    (each, rate), _ = nnls(matrix, np.ones_like(y))
    return {"each": float(each), name: float(rate / scale)}


def operations(repeats: int, *, is_small: bool) -> dict[str, Line]:
    """Matrix products, attention and element-wise kernels."""
    device = current_device()
    dtype = torch.bfloat16 if has_cuda() else torch.float32
    widths = (64, 128, 192) if is_small else (1024, 2048, 4096, 8192)
    sizes, times = [], []
    for width in widths:
        a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
        sizes.append(2.0 * width**3)
        times.append(seconds_of(lambda a=a, b=b: a @ b, repeats))
    found = {"matmul": line(sizes, times, "per_flop")}
    lengths = (64, 128, 256) if is_small else (1024, 2048, 4096, 8192)
    heads, dim = (2, 32) if is_small else (32, 128)
    sizes, times = [], []
    for length in lengths:
        q = torch.randn(1, heads, length, dim, device=device, dtype=dtype)
        sizes.append(2.0 * heads * length**2 * dim)  # causal: half of the two products
        attend = partial(scaled_dot_product_attention, q, q, q, is_causal=True)
        times.append(seconds_of(attend, repeats))
    found["attention"] = line(sizes, times, "per_flop")
    sizes, times = [], []
    for width in widths:
        x = torch.randn(width, width, device=device, dtype=dtype)
        sizes.append(2.0 * x.numel() * x.element_size())
        times.append(seconds_of(lambda x=x: silu(x), repeats))
    found["elementwise"] = line(sizes, times, "per_byte")
    return found


def launch_seconds() -> float:
    """Seconds in which the host queues one kernel."""
    x = torch.zeros(1, device=current_device())
    x.add_(1)
    synchronize()
    started = time.perf_counter()
    for _ in range(200):
        x.add_(1)
    queued = (time.perf_counter() - started) / 200
    synchronize()
    return queued


def links(repeats: int, *, is_small: bool) -> tuple[dict[str, Line], Line]:
    """Collectives over all processes, and messages from rank 0 to rank 1."""
    size, device = dist.get_world_size(), current_device()
    numbers = [2**n for n in ((10, 12, 14) if is_small else (16, 20, 24, 27))]
    found: dict[str, Line] = {}

    def measure(make: Callable[[torch.Tensor], Callable[[], object]]) -> Line:
        sizes, times = [], []
        for number in numbers:
            x = torch.zeros(number, device=device)
            sizes.append(4.0 * number)
            times.append(seconds_of(make(x), repeats))
        return line(sizes, times, "per_byte")

    def part(x: torch.Tensor) -> torch.Tensor:
        return x[: x.numel() // size]

    for kind, make in (
        ("all_reduce", lambda x: lambda: dist.all_reduce(x)),
        ("all_gather", lambda x: lambda: dist.all_gather_into_tensor(x, part(x).clone())),
        ("reduce_scatter", lambda x: lambda: dist.reduce_scatter_tensor(part(x).clone(), x)),
    ):
        found[f"{kind}/{size}"] = found[kind] = measure(make)

    def message(x: torch.Tensor) -> Callable[[], object]:
        def call() -> None:
            if dist.get_rank() == 0:
                dist.send(x, 1)
            elif dist.get_rank() == 1:
                dist.recv(x, 0)

        return call

    return found, measure(message)


def data_sheet_links(name: str) -> dict[str, Any] | None:
    """Rows of collectives and messages from the planner's table; None for another device."""
    known = [key for key in ("h100", "h200", "a100") if key in name.lower()]
    if not known:
        return None
    message = {"each": LATENCY, "per_byte": 1.0 / get_gpu(known[0]).link}
    twice = {"each": LATENCY, "per_byte": 2.0 * message["per_byte"]}
    return {"collectives": {"all_reduce": twice, "*": message}, "transfer": message}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/costs"), help="folder of costs.json")
    options = parser.parse_args()
    forbid_tf32()
    set_local_device(int(os.environ.get("LOCAL_RANK", "0")))
    is_small = not has_cuda()
    name = device_name() if has_cuda() else f"cpu, {platform.machine()}"
    table: dict[str, Any] = {
        "hardware": f"{name}, torch {torch.__version__}",
        "launch": launch_seconds(),
        "operations": operations(options.repeats, is_small=is_small),
    }
    rank = 0
    if (sheet := data_sheet_links(name)) is not None:
        table |= sheet
        table["hardware"] += "; links: not measured, of the data sheet"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(distributed_backend())
        rank = dist.get_rank()
        table["collectives"], table["transfer"] = links(options.repeats, is_small=is_small)
        table["hardware"] = f"{dist.get_world_size()} x {name}, torch {torch.__version__}"
        dist.destroy_process_group()
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(table, indent=1) + "\n"
        write_atomically(options.out / "costs.json", text.encode())
        print(text, end="")


if __name__ == "__main__":
    main()
