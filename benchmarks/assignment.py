"""Time of matching: the released loop, scipy in threads, lapx and every backend.

    python benchmarks/assignment.py                     # all of it; 11 minutes at --budget 0.6
    python benchmarks/assignment.py --quick             # one shape, about a minute
    python benchmarks/assignment.py --device cuda       # adds triton, on the GPU
    python benchmarks/assignment.py --keep --checkpoint runs/quickstart/pretrain_croc/iter_0000800

Solvers take turns, image batch by image batch, so that another process on the machine slows all of
them alike; the least of the turns is given, on the wall clock and in CPU seconds of the process.
`threads` is the number of cores they may use. `cost` is what the distances take, once for all
solvers; the released loop is both. Each cell has a budget of CPU seconds (--budget); a solver that
one image has shown to be too slow for a batch gets as many images as fit and the row says how
many. Nothing is extrapolated, and ratios are those of images that both have solved. lapx
(`pip install -e '.[bench]'`) takes part if it is installed, at one thread. `of best peer` is our
time over that of the faster of the released loop and lapx, in CPU seconds at one thread.

Distributions: `randn` and `unit` are the pool's two initial scales, under random tokens;
`clustered` has tokens and pool around 16 common centres. The others have demo pictures through a
vision tower of two layers (random weights) and a projector, so that tokens are correlated as those
of an image are, many of them nearly the same: before a randn pool (`photos`), a unit pool
(`photos-unit`), and a pool of other pictures' tokens with some noise, which is what training draws
it to (`photos-pool`). `same-tokens`, `same-rows` and `same-both` are `unit` with each token 8
times, each row of the pool 8 times, and both: exact duplicates. `checkpoint` (--checkpoint) has the
tokens
that a trained model makes of demo pictures before its own pool, at its own shape. 432 are replaced
of the 576 tokens of CLIP at 336 pixels, 547 of the 729 of SigLIP2 at 384, 2304 of four tiles.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import gelu, normalize

from megatron_croc.checkpoint.sharded import load_weights
from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.convert.exporting import read_run
from megatron_croc.convert.importing import one_process
from megatron_croc.data.demo.scenes import render_scene, sample_scene
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.model.transformer_configs import language_model_config
from megatron_croc.ops.assignment import Backend, assign, on_gpu, pairwise_cost

PATCH = 14
DISTRIBUTIONS = ("randn", "unit", "clustered", "photos", "photos-unit", "photos-pool")
DISTRIBUTIONS += ("same-tokens", "same-rows", "same-both")
SHAPES = ("432x2048", "547x2048", "2304x8192")
TURNS = 5
LOOP = "scipy loop"
COPIES = 8
RATIOS = ("ratio", "ratio_with_cost", "of_best_peer")
Solver = Callable[[Tensor], Tensor]


def draw(kind: str, num_images: int, shape: tuple[int, int], hidden_size: int) -> Iterator[Tensor]:
    """The cost [1, n, P] of each image, one after the other."""
    num_rows, num_columns = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    pool, centres = randn(num_columns, hidden_size), randn(16, hidden_size)
    if kind == "clustered":
        near = torch.randint(16, (num_columns,), generator=generator)
        pool = centres[near] + 0.3 * pool
    if kind in ("same-rows", "same-both"):
        pool = pool[torch.arange(num_columns) // COPIES]
    if kind in ("unit", "clustered", "photos-unit") or kind.startswith("same"):
        pool = normalize(pool, dim=-1)
    see = tower(hidden_size) if kind.startswith("photos") else None
    if kind == "photos-pool":
        assert see is not None
        others = range(num_images, num_images + num_columns // num_rows + 1)
        tokens = torch.cat([see(photo_patches(number, num_rows)) for number in others])
        pool = normalize(tokens[:num_columns], dim=-1) + 0.02 * normalize(pool, dim=-1)
    for image in range(num_images):
        if see is not None:
            tokens = see(photo_patches(image, num_rows))
            tokens = tokens[torch.randperm(len(tokens), generator=generator)[:num_rows]]
        else:
            tokens = randn(num_rows, hidden_size)
        if kind in ("same-tokens", "same-both"):
            order = torch.randperm(num_rows, generator=generator)
            tokens = tokens[torch.arange(num_rows) // COPIES][order]
        if kind == "clustered":
            near = torch.randint(16, (num_rows,), generator=generator)
            tokens = centres[near] + 0.3 * tokens
        yield pairwise_cost(normalize(tokens, dim=-1).unsqueeze(0), pool)


@torch.no_grad()
def draw_of_checkpoint(folder: Path, num_images: int) -> Tensor:
    """The costs [B, R, P] of a trained model for demo pictures and a random choice of tokens."""
    run = read_run(folder)
    run.parallel = ParallelConfig()
    config = language_model_config(
        run.model.language_model, parallel=run.parallel, training=run.training
    )
    transform = ImageTransform.build(run.model.vision_tower, "pad")
    scenes = [render_scene(sample_scene(0, number)) for number in range(num_images)]
    pixels = torch.stack([transform.decode_with_pil(scene) for scene in scenes])
    with one_process(seed=run.training.seed) as pg:
        groups: Any = pg
        model = CrocModel(run, config, groups, pre_process=True, post_process=True)
        load_weights(folder, [model], groups)
        model.eval()
        assert model.vision_tower is not None and model.projector is not None
        assert model.prompt_pool is not None, f"{folder} is not of stage pretrain_croc"
        tokens = model.projector(model.vision_tower(pixels)).float()
        generator = torch.Generator().manual_seed(0)
        chosen = [torch.randperm(tokens.shape[1], generator=generator) for _ in scenes]
        places = torch.stack(chosen)[:, : model.prompt_pool.num_replaced].sort(dim=1).values
        tokens = tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        return pairwise_cost(tokens, model.prompt_pool.weight)


def tower(hidden_size: int) -> Callable[[Tensor], Tensor]:
    """Patches [m, 588] -> [m, hidden_size]: two transformer layers of width 256, a projector."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        embed = torch.nn.Linear(3 * PATCH**2, 256)
        layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, 0.0, gelu, batch_first=True)
        layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        project = torch.nn.Linear(256, hidden_size)

    @torch.no_grad()
    def see(patches: Tensor) -> Tensor:
        return project(gelu(layers(embed(patches).unsqueeze(0)).squeeze(0)))

    return see


def photo_patches(number: int, at_least: int) -> Tensor:
    """Patches [g * g, 588] of a demo picture, the smallest g of 24, 27, 48 that gives enough."""
    grid = next(grid for grid in (24, 27, 48) if grid**2 >= at_least)
    with Image.open(io.BytesIO(render_scene(sample_scene(0, number)))) as file:
        image = file.convert("RGB").resize((grid * PATCH, grid * PATCH))
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1.0
    patches = pixels.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
    return patches.permute(0, 1, 3, 4, 2).reshape(grid * grid, -1)


def solve_released(cost: Tensor) -> Tensor:
    """As the released ViCToR code: one image after the other."""
    columns = [linear_sum_assignment(matrix.cpu().numpy())[1] for matrix in cost]
    return torch.from_numpy(np.stack(columns))


def backend_solver(backend: Backend, *, certify: bool = False) -> Solver:
    """`assign` as training calls it, or with the proof of optimality."""
    return lambda cost: assign(cost, backend=backend, certify=certify).index


def solvers(num_threads: int, device: str) -> dict[str, Solver]:
    """Compared solvers by name."""
    ours = {"cpu": backend_solver("cpu"), "cpu, certified": backend_solver("cpu", certify=True)}
    if num_threads > 1:
        pool = ThreadPoolExecutor(num_threads)

        def in_threads(cost: Tensor) -> Tensor:
            matrices = [matrix.numpy() for matrix in cost]
            columns = [match[1] for match in pool.map(linear_sum_assignment, matrices)]
            return torch.from_numpy(np.stack(columns))

        return {"scipy threads": in_threads, **ours}
    found: dict[str, Solver] = {LOOP: solve_released, **ours}
    if device == "cuda":
        found["triton"] = backend_solver("triton")
    try:
        import lap  # type: ignore[import-not-found]
    except ImportError:
        return found

    def solve_lapx(cost: Tensor) -> Tensor:  # lapjvr: the fastest of its solvers here
        return torch.from_numpy(
            np.stack([lap.lapjvr(m.numpy(), extend_cost=True, return_cost=False)[1] for m in cost])
        )

    return {**found, "lapx": solve_lapx}


class Turns:
    """Least wall and CPU seconds of a solver on one batch, over the turns it had."""

    def __init__(self, solve: Solver, images: Tensor) -> None:
        """Nothing measured yet; what the budget leaves of the batch."""
        self.solve, self.images = solve, images
        self.wall = self.cpu = float("inf")
        self.spent = 0.0
        self.index = torch.empty(0)

    def take(self) -> None:
        """One turn; costs have just been read, as those that were just computed are."""
        self.images.sum()
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        self.index = self.solve(self.images)
        wait()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.wall, self.cpu = min(self.wall, wall), min(self.cpu, cpu)
        self.spent += cpu

    def on_first(self, num_images: int) -> "Turns":
        """The same solver on fewer images, nothing measured yet."""
        return Turns(self.solve, self.images[:num_images])


def take_turns(turns: list[Turns], budget: float) -> None:
    """One turn each, and again up to `TURNS` times while a solver stays in its budget."""
    for turn in range(TURNS):
        for each in turns:
            if turn == 0 or each.spent + each.spent / turn <= budget:
                each.take()


def wait() -> None:
    """Until the GPU, if there is one, has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_cell(
    kind: str, shape: tuple[int, int], batches: list[int], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of one distribution at one shape; the batch before tells what an image takes."""
    is_large = shape[0] * shape[1] > 4e6
    most = [b for b in batches if b <= 4] if is_large else batches
    if kind == "checkpoint":
        cost = draw_of_checkpoint(options.checkpoint, max(most))
        shape = int(cost.shape[1]), int(cost.shape[2])
    else:
        cost = torch.cat(list(draw(kind, max(most), shape, options.hidden_size)))
    seconds_of_cost = time_of_cost(shape, options.hidden_size)
    cores = os.sched_getaffinity(0)
    per_image: dict[tuple[int, str], float] = {}
    for batch in most:
        optima: dict[int, float] = {}
        num_shared = batch
        for num_threads in sorted({1, len(cores)}):  # one first: it says what all can share
            os.sched_setaffinity(0, sorted(cores)[:num_threads])
            turns = {}
            known_solvers = solvers(num_threads, options.device)
            for name, solve in known_solvers.items():
                known = per_image.get((num_threads, name)) or per_image.get((1, name), 0.0)
                fits = batch if known == 0.0 else int(options.budget / known)
                if fits == 0 and batch > most[0]:
                    continue
                images = cost[: max(1, min(batch, fits))]
                images = images.to(options.device) if name == "triton" else images
                turns[name] = Turns(solve, images)
            take_turns(list(turns.values()), options.budget)
            if num_threads == 1:
                num_shared = min((len(each.images) for each in turns.values()), default=0)
            shared = {
                name: each if len(each.images) == num_shared else each.on_first(num_shared)
                for name, each in turns.items()
                if len(each.images) >= num_shared > 0
            }
            take_turns([each for each in shared.values() if each.spent == 0.0], options.budget)
            os.sched_setaffinity(0, cores)
            for name, each in turns.items():
                num_images = len(each.images)
                per_image[num_threads, name] = each.cpu / num_images
                index = each.index.cpu()
                taken = cost[:num_images].gather(2, index.unsqueeze(2)).double().sum(dim=(1, 2))
                for image, objective in enumerate(taken.tolist()):
                    optima.setdefault(image, objective)  # scipy's comes first
                gaps = [value / optima[image] - 1.0 for image, value in enumerate(taken.tolist())]
                row = {
                    "distribution": kind,
                    "shape": f"{shape[0]}x{shape[1]}",
                    "batch": batch,
                    "images_measured": num_images,
                    "threads": num_threads,
                    "solver": name,
                    "wall_ms_per_image": 1e3 * each.wall / num_images,
                    "cpu_ms_per_image": 1e3 * each.cpu / num_images,
                    "cost_ms_per_image": 1e3 * seconds_of_cost,
                    "gap": max(gaps),
                }
                if name in shared:
                    row["images_shared"] = num_shared
                    row["shared_wall_ms_per_image"] = 1e3 * shared[name].wall / num_shared
                    row["shared_cpu_ms_per_image"] = 1e3 * shared[name].cpu / num_shared
                yield row


def time_of_cost(shape: tuple[int, int], hidden_size: int) -> float:
    """CPU seconds of one image's distances, least of three."""
    tokens, pool = torch.randn(1, shape[0], hidden_size), torch.randn(shape[1], hidden_size)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        pairwise_cost(tokens, pool)
        seconds.append(time.process_time() - started)
    return min(seconds)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its speed over the scipy loop of the same batch, alone and with the cost.

    On the images that both have measured: no two take the same time. CPU seconds at one thread,
    else wall clock.
    """

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["distribution"], row["shape"], row["batch"]

    loop = {key(row): row for row in rows if row["solver"] == LOOP}
    for row in rows:
        base = loop.get(key(row))
        if base is not None and "images_shared" in row:
            on_core = row["threads"] == 1 and row["solver"] != "triton"
            clock = "shared_cpu_ms_per_image" if on_core else "shared_wall_ms_per_image"
            row["ratio"] = base[clock] / row[clock]
            if on_core:
                cost = row["cost_ms_per_image"]
                row["ratio_with_cost"] = (base[clock] + cost) / (row[clock] + cost)
    peers: dict[tuple[Any, ...], float] = {}
    clock = "shared_cpu_ms_per_image"
    for row in rows:
        if row["solver"] in (LOOP, "lapx") and clock in row:
            peers[key(row)] = min(row[clock], peers.get(key(row), float("inf")))
    for row in rows:
        if row["solver"].startswith("cpu") and row["threads"] == 1 and clock in row:
            row["of_best_peer"] = row[clock] / peers[key(row)]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| cost | n x P | batch | images | threads | solver | wall ms / image | CPU ms / image "
        "| x loop | with cdist | of best peer | gap |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("distribution", "shape", "batch", "images_measured", "threads", "solver")
    for row in rows:
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in RATIOS]
        times = [f"{row[key]:.1f}" for key in ("wall_ms_per_image", "cpu_ms_per_image")]
        cells = [*(row[key] for key in names), *times, *ratios, f"{row['gap']:.1e}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def kept_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def cpuinfo() -> list[str]:
    """Lines of /proc/cpuinfo, none where there is no such file."""
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def versions() -> dict[str, str]:
    """Versions of the compared packages, "not installed" if so."""
    found = {}
    for name in ("torch", "numpy", "scipy", "lapx"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Milliseconds per image at one thread, one panel a shape, largest batch measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["distribution"] in DISTRIBUTIONS]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(6 * len(shapes), 3.5), squeeze=False)
    names = [n for n in (LOOP, "lapx", "cpu", "triton") if n in {row["solver"] for row in rows}]
    for axis, shape in zip(axes[0], shapes, strict=True):
        for offset, solver in enumerate(names):
            found = {
                row["distribution"]: row["wall_ms_per_image"]
                for row in rows
                if (row["shape"], row["threads"], row["solver"]) == (shape, 1, solver)
            }
            places = [DISTRIBUTIONS.index(kind) + 0.2 * offset - 0.3 for kind in found]
            axis.bar(places, list(found.values()), width=0.2, label=solver)
        axis.set_xticks(range(len(DISTRIBUTIONS)), DISTRIBUTIONS, fontsize="small", rotation=30)
        axis.set(title=shape, yscale="log", ylabel="ms per image, one thread")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="n x P")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--distributions", nargs="+", default=list(DISTRIBUTIONS))
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of stage pretrain_croc")
    parser.add_argument("--keep", action="store_true", help="keep rows of other cells in --out")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument(
        "--budget", type=float, default=1.5, help="CPU seconds of a solver and cell"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="432x2048, batches of 1 and 4")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.batches, options.budget = ["432x2048"], [1, 4], 0.5
    if options.device == "cuda" and (reason := on_gpu.unsupported_reason(torch.device("cuda"))):
        parser.error(f"--device cuda: {reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    sizes = [list(map(int, text.split("x"))) for text in options.shapes]
    shapes = [(num_rows, num_columns) for num_rows, num_columns in sizes]
    cells = [(kind, shape) for shape in shapes for kind in options.distributions]
    if options.checkpoint is not None:
        cells = [("checkpoint", (0, 0))]
    names = [line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")]
    hardware = f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPU cores"
    if options.device == "cuda":
        hardware += f", {torch.cuda.get_device_name()}"
    machine = {
        "hardware": hardware,
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        "hidden_size": options.hidden_size,
    }
    kept = kept_rows(options.out / "assignment.json") if options.keep else []
    for kind, shape in cells:
        new = []
        for row in run_cell(kind, shape, sorted(options.batches), options):
            new.append(row)
            print(f"{row['wall_ms_per_image']:10.1f} ms", *list(row.values())[:6], flush=True)
        rows += with_ratios([{**row, "load": os.getloadavg()[0]} for row in new])
        cells_done = {(row["distribution"], row["shape"]) for row in rows}
        others = [row for row in kept if (row["distribution"], row["shape"]) not in cells_done]
        write(options.out, machine, others + rows)  # now: a later cell may be cut short
    print(table(rows))


def write(folder: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Results, table and plot."""
    result = {**machine, "rows": rows}
    (folder / "assignment.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "assignment.md").write_text(table(rows))
    if any(row["distribution"] in DISTRIBUTIONS for row in rows):
        plot(rows, folder / "assignment.png")


if __name__ == "__main__":
    main()
