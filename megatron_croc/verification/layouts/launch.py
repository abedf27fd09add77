"""Run every layout on its own processes and compare it with one process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_croc.errors import CrocError
from megatron_croc.verification.layouts.compare import BOUNDS, HEAD, Difference, compare, row
from megatron_croc.verification.layouts.layout import Layout
from megatron_croc.verification.layouts.observe import Observation, assemble
from megatron_croc.verification.layouts.picture import draw, draw_curves

ONE = Layout(name="one")
"""The single process everything is compared with."""


def launch(
    layout: Layout, arguments: Sequence[str], *, fault: str | None = None, on_cpu: bool = False
) -> Observation:
    """Start a worker on every process of the layout and assemble the results.

    Args:
        layout: the layout.
        arguments: those of the command.
        fault: one to plant in the workers.
        on_cpu: hide the GPUs from the workers.

    Raises:
        CrocError: a worker failed; its output has been printed.
    """
    with tempfile.TemporaryDirectory(prefix="layout-parity-") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(layout.world_size), "-m"]
        command += ["megatron_croc", "parity", "layouts", *arguments]
        command += ["--worker", layout.name, "--worker-folder", folder]
        command += ["--plant", fault] if fault else []
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-6000:], sep="\n", file=sys.stderr)
            raise CrocError(f"layout {layout.name}: a worker failed, see above")
        ranks = [
            # Written a moment ago by our own workers, in a folder only we can write to.
            torch.load(Path(folder) / f"rank{number}.pt", weights_only=False)
            for number in range(layout.world_size)
        ]
    return assemble(ranks)


def compare_layouts(
    layouts: Sequence[Layout],
    arguments: Sequence[str],
    *,
    dtype: str,
    out: Path,
    fault: str | None = None,
    reference_on_cpu: bool = False,
) -> int:
    """Compare every layout with one process, write JSON and a picture; 1 when any differs."""
    bounds = BOUNDS[dtype]
    out.mkdir(parents=True, exist_ok=True)
    reference = launch(ONE, arguments, on_cpu=reference_on_cpu)
    differences: list[Difference] = []
    costs: list[dict] = [_cost(ONE, reference)]
    print(HEAD)
    for layout in layouts:
        ours = launch(layout, arguments, fault=fault)
        differences.append(compare(layout.name, ours, reference))
        costs.append(_cost(layout, ours))
        print(row(differences[-1], bounds), flush=True)
    result = {
        "bounds": bounds,
        "reference": reference.steps,
        "layouts": [asdict(difference) for difference in differences],
        "costs": costs,
    }
    (out / "layouts.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(differences, out / "layouts.png", bound=bounds["gradient"])
    draw_curves(costs, out / "curves.png")
    print(f"wrote layouts.json, layouts.png and curves.png to {out}")
    failed = [d.layout for d in differences if d.failures(bounds)]
    print(f"FAILED: {', '.join(failed)}" if failed else f"PASSED: {len(differences)} layouts")
    return int(bool(failed))


def _cost(layout: Layout, observation: Observation) -> dict:
    return {
        "layout": layout.name,
        "processes": layout.world_size,
        "seconds_per_step": observation.seconds_per_step,
        "peak_bytes_of_a_rank": observation.peak_bytes,
        "steps": observation.steps,
    }
