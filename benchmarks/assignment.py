"""What matching costs: the released loop, scipy in threads, lapx and ours, side by side.

    python benchmarks/assignment.py [--shapes 432x2048 547x2048] [--batches 1 4 16 64]
                                    [--limit 60] [--out benchmarks/results]

Times the solver alone and, once for all solvers, the distances it is given (`cost`); the released
loop is both. Single-thread numbers are CPU seconds of one core, which other people's processes
do not lengthen; numbers with threads are wall-clock. A cell that would take longer than --limit
seconds, judged by the batch before it, is left out. lapx takes part if it is installed.

Distributions: `randn` and `unit` are the pool's two initial scales, under random tokens;
`clustered` has tokens and pool around 16 common centres; `scenes` has tokens as correlated as an
image's are (patches of the demo scenes through a random two-layer network) before a randn pool.
"""

import argparse
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import gelu, normalize

from megatron_croc.data.demo.scenes import render_scene, sample_scene
from megatron_croc.ops.assignment import assign, pairwise_cost

PATCH = 14
DISTRIBUTIONS = ("randn", "unit", "clustered", "scenes")
Solver = Callable[[Tensor], Tensor]


def draw(kind: str, num_images: int, shape: tuple[int, int], hidden_size: int) -> Iterator[Tensor]:
    """The cost [1, n, P] of each image, one after the other: large ones need not all fit."""
    num_rows, num_columns = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    pool, centres = randn(num_columns, hidden_size), randn(16, hidden_size)
    if kind == "clustered":
        near = torch.randint(16, (num_columns,), generator=generator)
        pool = centres[near] + 0.3 * pool
    if kind in ("unit", "clustered"):
        pool = normalize(pool, dim=-1)
    layers = randn(3 * PATCH**2, hidden_size) / 24, randn(hidden_size, hidden_size) / 64
    for image in range(num_images):
        if kind == "scenes":
            tokens = gelu(scene_patches(image, num_rows) @ layers[0]) @ layers[1]
            tokens = tokens[torch.randperm(len(tokens), generator=generator)[:num_rows]]
        else:
            tokens = randn(num_rows, hidden_size)
        if kind == "clustered":
            near = torch.randint(16, (num_rows,), generator=generator)
            tokens = centres[near] + 0.3 * tokens
        yield pairwise_cost(normalize(tokens, dim=-1).unsqueeze(0), pool)


def scene_patches(number: int, at_least: int) -> Tensor:
    """Patches [g * g, 588] of a demo scene, the smallest g of 24, 27, 48 that gives enough."""
    grid = next(grid for grid in (24, 27, 48) if grid**2 >= at_least)
    with Image.open(io.BytesIO(render_scene(sample_scene(0, number)))) as file:
        image = file.convert("RGB").resize((grid * PATCH, grid * PATCH))
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1.0
    patches = pixels.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
    return patches.reshape(grid * grid, -1)


def solve_released(cost: Tensor) -> Tensor:
    """As the released ViCToR code: one image after the other."""
    columns = [linear_sum_assignment(matrix.cpu().numpy())[1] for matrix in cost]
    return torch.from_numpy(np.stack(columns))


def solve_ours(cost: Tensor) -> Tensor:
    """`assign` as training calls it."""
    return assign(cost, certify=False).index


def solve_certified(cost: Tensor) -> Tensor:
    """`assign` with the proof of optimality."""
    return assign(cost).index


def solvers(num_threads: int) -> dict[str, Solver]:
    """What is compared, by name."""
    found: dict[str, Solver] = {"ours": solve_ours, "ours, certified": solve_certified}
    if num_threads > 1:
        pool = ThreadPoolExecutor(num_threads)

        def in_threads(cost: Tensor) -> Tensor:
            matrices = [matrix.numpy() for matrix in cost]
            columns = [match[1] for match in pool.map(linear_sum_assignment, matrices)]
            return torch.from_numpy(np.stack(columns))

        return {"scipy threads": in_threads, **found}
    try:
        import lap  # type: ignore[import-not-found]
    except ImportError:
        return {"scipy loop": solve_released, **found}

    def solve_lapx(cost: Tensor) -> Tensor:
        columns = [lap.lapjv(matrix.double().numpy(), extend_cost=True)[1] for matrix in cost]
        return torch.from_numpy(np.stack(columns)).long()

    return {"scipy loop": solve_released, "lapx": solve_lapx, **found}


def measure(solve: Solver, cost: Tensor, *, clock: Callable[[], float]) -> tuple[float, Tensor]:
    """Least seconds of up to five calls that together take about a second; and the result."""
    best, spent = float("inf"), 0.0
    index = torch.empty(0)
    for _ in range(5):
        started = clock()
        index = solve(cost)
        elapsed = clock() - started
        best, spent = min(best, elapsed), spent + elapsed
        if spent > 1.0:
            break
    return best, index


def run_cell(
    kind: str, shape: tuple[int, int], batches: list[int], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of one distribution at one shape."""
    cost = torch.cat(list(draw(kind, max(batches), shape, options.hidden_size)))
    tokens = torch.randn(1, shape[0], options.hidden_size)
    pool = torch.randn(shape[1], options.hidden_size)
    started = time.thread_time()
    pairwise_cost(tokens, pool)
    seconds_of_cost = time.thread_time() - started
    cores = os.sched_getaffinity(0)
    per_image: dict[tuple[int, str], float] = {}
    for num_images in batches:
        images = cost[:num_images]
        optimum = None
        for num_threads in sorted({1, len(cores)}):
            os.sched_setaffinity(0, sorted(cores)[:num_threads])
            clock = time.thread_time if num_threads == 1 else time.perf_counter
            for name, solve in solvers(num_threads).items():
                expected = per_image.get((num_threads, name), 0.0) * num_images
                if expected > options.limit:
                    continue
                seconds, index = measure(solve, images, clock=clock)
                per_image[num_threads, name] = seconds / num_images
                objective = images.gather(2, index.unsqueeze(2)).double().sum(dim=(1, 2))
                optimum = objective if optimum is None else optimum  # scipy comes first
                gap = float(((objective - optimum) / optimum).max())
                yield {
                    "distribution": kind,
                    "shape": f"{shape[0]}x{shape[1]}",
                    "batch": num_images,
                    "threads": num_threads,
                    "solver": name,
                    "milliseconds_per_image": 1e3 * seconds / num_images,
                    "cost_milliseconds_per_image": 1e3 * seconds_of_cost,
                    "gap": gap,
                }
            os.sched_setaffinity(0, cores)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its speed over the scipy loop at one thread, alone and with the distances."""
    loop = {
        (row["distribution"], row["shape"], row["batch"]): row["milliseconds_per_image"]
        for row in rows
        if row["solver"] == "scipy loop"
    }
    for row in rows:
        base = loop.get((row["distribution"], row["shape"], row["batch"]))
        if base is not None:
            own, cost = row["milliseconds_per_image"], row["cost_milliseconds_per_image"]
            row["ratio"] = base / own
            row["ratio_with_cost"] = (base + cost) / (own + cost)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| cost | n x P | images | threads | solver | ms / image | x loop | with cdist | gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "ratio_with_cost")]
        cells = [row[key] for key in ("distribution", "shape", "batch", "threads", "solver")]
        cells += [f"{row['milliseconds_per_image']:.1f}", *ratios, f"{row['gap']:.1e}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Milliseconds per image at one thread, one panel a shape, largest batch measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(5 * len(shapes), 3.5), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for offset, solver in enumerate(("scipy loop", "lapx", "ours", "ours, certified")):
            found = {
                row["distribution"]: row["milliseconds_per_image"]
                for row in rows
                if (row["shape"], row["threads"], row["solver"]) == (shape, 1, solver)
            }
            places = [DISTRIBUTIONS.index(kind) + 0.2 * offset - 0.3 for kind in found]
            axis.bar(places, list(found.values()), width=0.2, label=solver)
        axis.set_xticks(range(len(DISTRIBUTIONS)), DISTRIBUTIONS)
        axis.set(title=shape, yscale="log", ylabel="ms per image, one thread")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["432x2048", "547x2048", "2304x8192"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="n x P")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of one measurement")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for text in options.shapes:
        num_rows, num_columns = (int(size) for size in text.split("x"))
        for kind in DISTRIBUTIONS:
            for row in run_cell(kind, (num_rows, num_columns), sorted(options.batches), options):
                rows.append(row)
                print(f"{row['milliseconds_per_image']:10.1f} ms", *list(row.values())[:5])
    rows = with_ratios(rows)
    result = {
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores",
        "command": " ".join(["python", *sys.argv]),
        "hidden_size": options.hidden_size,
        "rows": rows,
    }
    (options.out / "assignment.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "assignment.md").write_text(table(rows))
    plot(rows, options.out / "assignment.png")
    print(table(rows))


if __name__ == "__main__":
    main()
