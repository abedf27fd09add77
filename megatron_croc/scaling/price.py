"""Table of a grid's runs with the cost of each, as the planner estimates it."""

from megatron_croc.planning.gpus import get_gpu
from megatron_croc.planning.memory import estimate_memory
from megatron_croc.planning.step_time import estimate_step
from megatron_croc.planning.workload import from_numbers
from megatron_croc.scaling.grid import Grid

TEXT_TOKENS = 150.0
"""Mean text tokens of a sample, for the price (a detailed caption and its question)."""


def price_table(grid: Grid) -> str:
    """Markdown table of every run's size, samples, steps, memory and GPU hours."""
    gpu = get_gpu(grid.gpu)
    lines = [
        "| run | trained parameters | samples | steps | GiB on a GPU | GPU hours |",
        "|---|---|---|---|---|---|",
    ]
    total = 0.0
    for entry in grid.runs:
        run, steps = entry.run, entry.run.training.train_iters or 0
        workload = from_numbers(run, text_tokens=TEXT_TOKENS)
        step = estimate_step(run, grid.world_size, gpu, workload)
        hours = step.total * steps * grid.world_size / 3600
        total += hours
        memory = estimate_memory(run, grid.world_size, workload.pack(run))
        worst = max(stage.peak for stage in memory) / 2**30
        lines.append(
            f"| {entry.name} | {entry.num_parameters:,} | {entry.num_samples:,} | {steps:,} | "
            f"{worst:.2f} | {hours:,.4g} |"
        )
    lines += ["", f"{len(grid.runs)} runs, {total:,.4g} GPU hours on {gpu.name} (an estimate)."]
    return "\n".join(lines)
