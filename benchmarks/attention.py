"""Mixed attention beside the causal flash that is its floor: time, memory, efficiency.

    python benchmarks/attention.py [--out benchmarks/results] [--lengths 2048 4096 8192 32768]

One run compares on the same tensors: causal flash (the floor), flip, flip with rows moved by torch
operations (where Triton moves them by default), flex, fa4, ffa, dense SDPA one sample at a time
(what `dense` is) and dense SDPA with one mask over the whole row. Rows: one Croc sample, a pack of
Croc samples, a pack of samples with several images; masks `visual` and `prefix`; 32 x 128
heads, as many key heads (mha) or 8 (gqa); forward, and forward with backward.

    E = (causal time x pairs of the mask / pairs of the causal mask) / mixed time

is 1 where the mixed mask runs at the speed of causal flash per pair. `err` is the error of outputs
and gradients against float64, as a multiple of causal flash's under its own mask; rows longer than
--error-length are not checked. Without --out it only prints; with it, attention.json, attention.txt
(the table) and attention.png are written there. On a CPU the sizes are small, the
kernels emulated and the times say nothing about a GPU: it shows that the script runs.
"""

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_croc.costs.flops import visible_pairs
from megatron_croc.errors import first_line
from megatron_croc.ops.attention import attend
from megatron_croc.ops.attention.backends import choose_backend
from megatron_croc.ops.attention.dense import attend_formula
from megatron_croc.ops.attention.flash import choose_flash
from megatron_croc.ops.attention.flip import attend_flip
from megatron_croc.ops.attention.measured import write_table
from megatron_croc.ops.attention.position_ops import choose_position_ops
from megatron_croc.ops.attention.torch_position_ops import TORCH_POSITION_OPS
from megatron_croc.ops.mixed_mask import MixedMask
from megatron_croc.parallel.device import current_device, device_name, has_cuda, synchronize

TEXT_BEFORE, TEXT_AFTER, IMAGE = 35, 300, 576
"""Tokens of a Croc sample: before its image, after it, and the image's."""

Layout = list[tuple[int, list[tuple[int, int]], int]]
"""Samples: (length, spans of the images, first label)."""


def one_sample(length: int, image: int) -> Layout:
    """Croc's one image in a sample as long as the row."""
    begin = min(TEXT_BEFORE, length - image - 1)
    return [(length, [(begin, begin + image)], begin + image)]


def croc_pack(length: int, image: int) -> Layout:
    """Croc samples of about their natural length, stretched or cut to fill the row."""
    count = max(1, round(length / (TEXT_BEFORE + image + TEXT_AFTER)))
    size = length // count
    rest = length - size * (count - 1)
    return [one_sample(n, min(image, n - 2))[0] for n in [*[size] * (count - 1), rest]]


def image_pack(length: int, image: int) -> Layout:
    """Four samples of adjacent images with text around them, as many as fit."""
    size = length // 4
    count = max(1, (size - TEXT_BEFORE - 1) // image)
    image = min(image, (size - TEXT_BEFORE - 1) // count)
    begins = range(TEXT_BEFORE, TEXT_BEFORE + count * image, image)
    return [(size, [(b, b + image) for b in begins], begins[-1] + image)] * 4


ROWS = {"one sample": one_sample, "croc pack": croc_pack, "image pack": image_pack}


def build_mask(layout: Layout, mask_type: str) -> MixedMask:
    """The mask of `visual` or `prefix` over these samples."""
    bounds, spans = [0], []
    for length, images, first_label in layout:
        held = images if mask_type == "visual" else [(0, first_label)]
        spans += [(bounds[-1] + begin, bounds[-1] + end) for begin, end in held]
        bounds.append(bounds[-1] + length)
    return MixedMask.build(bounds, spans)


def sdpa_with_mask(q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor) -> Tensor:
    """torch's attention with one dense mask over the row: what a model without packing does."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def contenders(mask: MixedMask, query: Tensor) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Name and function of what is compared; causal flash first."""
    causal = MixedMask.build(mask.bounds).to(mask.device)
    scale = query.shape[-1] ** -0.5
    run = functools.partial(attend, softmax_scale=scale)
    yield "causal flash", functools.partial(run, mask=causal, backend="flip")
    yield "flip", functools.partial(run, mask=mask, backend="flip")
    flash = choose_flash(query)
    if flash is not None and choose_position_ops(query) is not TORCH_POSITION_OPS:
        yield (
            "flip, torch",
            functools.partial(
                attend_flip,
                plan=mask.flip,
                softmax_scale=scale,
                flash=flash,
                position_ops=TORCH_POSITION_OPS,
            ),
        )
    for name in ("flex", "fa4", "ffa", "dense"):
        yield name, functools.partial(run, mask=mask, backend=name)
    yield "sdpa + mask", functools.partial(sdpa_with_mask, visible=mask.visible())


Results = list[Tensor]
"""Output and gradients of query, key and value, float64, of the real rows."""


def exact(mask: MixedMask, tensors: list[Tensor], grad: Tensor) -> Results:
    """The formula in float64, one group of heads after the other."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    repeats, visible = tensors[0].shape[1] // tensors[1].shape[1], mask.visible()
    outputs: list[Tensor] = []
    for group in range(tensors[1].shape[1]):
        heads = slice(group * repeats, (group + 1) * repeats)
        query, (key, value) = leaves[0][:, heads], (x[:, [group]] for x in leaves[1:])
        scale = query.shape[-1] ** -0.5
        out = attend_formula(query, key, value, visible, softmax_scale=scale)
        (out * grad[:, heads].double()).sum().backward()
        outputs.append(out.detach())
    return [torch.cat(outputs, dim=1), *(x.grad for x in leaves if x.grad is not None)]


def error(
    function: Callable[..., Tensor], truth: Results, tensors: list[Tensor], grad: Tensor
) -> float:
    """Relative error: the root of the sum of squares over output and gradients."""
    out = function(*tensors)
    found = (out.detach(), *torch.autograd.grad(out, tensors, grad))
    parts = ((x.double() - y).norm() / y.norm() for x, y in zip(found, truth, strict=True))
    return float(torch.stack([part.square() for part in parts]).sum().sqrt())


def measure(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(median milliseconds, peak MiB above what was held before)."""
    for _ in range(2 if repeats > 1 else 1):
        function()
    synchronize()
    held = _reset_peak()
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3, (_peak() - held) / 2**20


def _reset_peak() -> int:
    if not has_cuda():
        return 0
    memory = torch.get_device_module(current_device())
    memory.reset_peak_memory_stats()
    return memory.memory_allocated()


def _peak() -> int:
    return torch.get_device_module(current_device()).max_memory_allocated() if has_cuda() else 0


def compare(
    case: dict[str, Any],
    mask: MixedMask,
    tensors: list[Tensor],
    *,
    repeats: int,
    check_errors: bool,
) -> Iterator[dict[str, Any]]:
    """One row per contender: forward, and forward with backward."""
    causal = MixedMask.build(mask.bounds).to(mask.device)
    pairs = visible_pairs(_lengths(mask.bounds), [e - b for b, e in mask.span_bounds])
    ratio = pairs / visible_pairs(_lengths(mask.bounds))
    grad = torch.randn_like(tensors[0])
    truths = [exact(m, tensors, grad) for m in (causal, mask)] if check_errors else None
    floor: dict[str, float] = {}
    for name, function in contenders(mask, tensors[0]):
        is_floor = name == "causal flash"
        for direction in ("forward", "forward+backward"):
            row = {**case, "contender": name, "direction": direction, "pair_ratio": ratio}
            try:
                call = functools.partial(_step, function, tensors, grad, direction != "forward")
                milliseconds, memory = measure(call, repeats)
                if truths is not None and direction != "forward":
                    deviation = error(function, truths[0 if is_floor else 1], tensors, grad)
                    row["error"] = deviation
                    row["relative_error"] = deviation / floor.setdefault("error", deviation)
            except (RuntimeError, ValueError) as failure:  # out of memory, or not on this device
                yield {**row, "reason": first_line(failure)}
                continue
            floor.setdefault(direction, milliseconds)
            pairs_done = 1.0 if is_floor else ratio  # causal flash computes the causal pairs only
            yield {
                **row,
                "milliseconds": milliseconds,
                "peak_mib": memory if has_cuda() else None,
                "efficiency": floor[direction] * pairs_done / milliseconds,
            }


def _step(
    function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, backward: bool
) -> None:
    if not backward:
        with torch.no_grad():
            function(*tensors)
        return
    torch.autograd.grad(function(*tensors), tensors, grad)


def _lengths(bounds: tuple[int, ...]) -> list[int]:
    return [end - begin for begin, end in itertools.pairwise(bounds)]


HEADER = "{:>6} {:<11} {:<7} {:<5} {:<17} {:<13} {:>10} {:>9} {:>6} {:>6}".format(
    "length", "row", "mask", "heads", "direction", "contender", "ms", "MiB", "E", "err"
)


def to_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    head = (
        f"{row['length']:>6} {row['row']:<11} {row['mask']:<7} {row['heads']:<5} "
        f"{row['direction']:<17} {row['contender']:<13}"
    )
    if "reason" in row:
        return f"{head} {'-':>10}  {row['reason'][:90]}"
    memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    deviation = f"{row['relative_error']:.2f}" if "relative_error" in row else "-"
    return f"{head} {row['milliseconds']:10.2f} {memory:>9} {row['efficiency']:6.2f} {deviation:>6}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Efficiency over length, one panel per kind of row, forward with backward, mha."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(ROWS), figsize=(12, 6), sharex=True, sharey=True)
    for panels, mask_type in zip(axes, ("visual", "prefix"), strict=True):
        for panel, kind in zip(panels, ROWS, strict=True):
            chosen = [
                r
                for r in rows
                if (r["row"], r["mask"], r["heads"]) == (kind, mask_type, "mha")
                and r["direction"] == "forward+backward"
                and "efficiency" in r
            ]
            for name in dict.fromkeys(r["contender"] for r in chosen):
                line = [(r["length"], r["efficiency"]) for r in chosen if r["contender"] == name]
                panel.plot(*zip(*line, strict=True), marker="o", label=name)
            panel.set(title=f"{kind}, {mask_type}", xscale="log", xlabel="tokens", ylabel="E")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"Speed per visible pair, causal flash = 1 ({device_name()})")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run every case, print the table, keep it when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_cuda = has_cuda()
    lengths = [2048, 4096, 8192, 32768] if on_cuda else [256, 512]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--heads", type=int, default=32 if on_cuda else 4)
    parser.add_argument("--groups", type=int, default=8 if on_cuda else 1, help="key heads of gqa")
    parser.add_argument("--head-dim", type=int, default=128 if on_cuda else 32)
    parser.add_argument("--image", type=int, default=IMAGE if on_cuda else 64, help="its tokens")
    parser.add_argument("--dtype", default="bfloat16" if on_cuda else "float32")
    parser.add_argument("--repeats", type=int, default=20 if on_cuda else 3)
    parser.add_argument("--error-length", type=int, default=2048 if on_cuda else 256)
    parser.add_argument("--out", type=Path, help="folder for attention.json and attention.png")
    parser.add_argument(
        "--keep-for-auto",
        action="store_true",
        help="on a GPU: --attention-backend auto chooses by these times from now on",
    )
    options = parser.parse_args()

    device, dtype = current_device(), getattr(torch, options.dtype)
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for length in options.lengths:
        for heads, groups in (("mha", options.heads), ("gqa", options.groups)):
            shapes = [(length, n, options.head_dim) for n in (options.heads, groups, groups)]
            tensors = [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]
            for kind in options.rows:
                for mask_type in ("visual", "prefix"):
                    mask = build_mask(ROWS[kind](length, options.image), mask_type).to(device)
                    case = {"length": length, "row": kind, "mask": mask_type, "heads": heads}
                    for row in compare(
                        case,
                        mask,
                        tensors,
                        repeats=options.repeats,
                        check_errors=length <= options.error_length,
                    ):
                        print(to_line(row), flush=True)
                        rows.append(row)
    if options.keep_for_auto and on_cuda:
        file = write_table(device_name(), options.head_dim, rows)
        print(f"--attention-backend auto chooses by {file} from now on")
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    query = torch.empty(1, options.heads, options.head_dim, device=device, dtype=dtype)
    flash = choose_flash(query)
    result = {
        "hardware": device_name() if on_cuda else f"cpu, {platform.machine()}",
        "torch": torch.__version__,
        "flash": flash.name if flash is not None else None,
        "row_operations": choose_position_ops(query).name,
        "auto": choose_backend("auto", query),
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "rows": rows,
    }
    (options.out / "attention.json").write_text(json.dumps(result, indent=1) + "\n")
    table = "\n".join([HEADER, *map(to_line, rows)])
    (options.out / "attention.txt").write_text(table + "\n")
    plot(rows, options.out / "attention.png")


if __name__ == "__main__":
    main()
