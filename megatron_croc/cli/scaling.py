"""Scaling experiments: a grid of runs, checked and priced, launched, fitted and drawn.

    croc scaling plan   GRID.yaml --out DIR     # table of runs and GPU hours; writes it
    croc scaling launch GRID.yaml --out DIR [--at-once 2 | --slurm [--submit]]
    croc scaling fit    GRID.yaml --out DIR [--metric valid_loss] [--target-samples 3e7]
    croc scaling report GRID.yaml --out DIR     # fit, and DIR/report.{md,html,png}
    croc scaling all    GRID.yaml --out DIR     # plan, launch here, report

GRID.yaml is described in megatron_croc/scaling/grid.py. --data FOLDER names a folder of the demo's
form (shards/STAGE, shards/valid_STAGE, tokenizer.model) instead of paths in the grid. Unfinished
runs are started again by the same command; finished ones are not changed.

A file with `arms` compares arms of several stages by the answers they give in the end; its form is
described in megatron_croc/scaling/arms.py. plan, launch, report and all take it, and need --data:

    croc scaling all ARMS.yaml --out DIR --data DATA [--at-once 2] [--minutes 60]
    croc scaling all ARMS.yaml --out DIR --data DATA --profile gpu     # the file's other size
"""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.cli.errors import reports_errors
from megatron_croc.cli.outputs import refuse_unwritable
from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import ConfigError
from megatron_croc.scaling.arms import is_plan_of_arms, markdown_of_plan, read_plan
from megatron_croc.scaling.grid import Grid, read_grid

COMMANDS = ("plan", "launch", "fit", "report", "all")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="croc scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("grid", type=Path, help="the grid, a YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--data", type=Path, help="folder of shards and tokenizer (see above)")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--nice", type=int, default=0, help="niceness of local runs")
    parser.add_argument("--slurm", action="store_true", help="write an sbatch array instead")
    parser.add_argument("--submit", action="store_true", help="with --slurm: also call sbatch")
    parser.add_argument("--hours", type=float, default=24.0, help="Slurm's limit for one run")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--sbatch", action="append", default=[], help="one more #SBATCH option")
    parser.add_argument("--metric", default="valid_loss", help="what is fitted (valid_...)")
    parser.add_argument("--target-samples", type=float, nargs="+", default=[1.5e6, 5e6, 3e7])
    parser.add_argument(
        "--minutes", type=float, help="of arms: start no further run after so many minutes"
    )
    parser.add_argument("--profile", help="of arms: one of the file's profiles")
    parser.add_argument("--arms", nargs="+", help="of arms: launch these alone")
    parser.add_argument("--resamples", type=int, default=200, help="fits behind the intervals")
    return parser.parse_args(argv)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = parse_arguments(argv)
    if is_plan_of_arms(options.grid):
        return compare_arms(options)
    for name in ("minutes", "profile", "arms"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} is for a file with arms; {options.grid} is a grid of runs")
    grid = read_grid(options.grid, options.out, data=options.data)
    refuse_unwritable("--out", options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command in ("plan", "all"):
        plan(grid, options.out)
    if options.command in ("launch", "all") and not launch(grid, options):
        return 1
    if options.command in ("fit", "report", "all"):
        report(grid, options, draw=options.command != "fit")
    return 0


def compare_arms(options: argparse.Namespace) -> int:
    """Run a command on a file with arms; return the exit status."""
    if options.command == "fit" or options.slurm:
        what = "fit" if options.command == "fit" else "--slurm"
        raise ConfigError(f"{what}: {options.grid} has arms, which run here and are not fitted")
    if options.data is None:
        raise ConfigError("--data is not given: the folder of shards, tokenizer and questions")
    arms = read_plan(options.grid, options.out, data=options.data, profile=options.profile)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command in ("plan", "all"):
        table = markdown_of_plan(arms)
        (options.out / "plan.md").write_text(table + "\n", encoding="utf-8")
        print(table)
    if options.command in ("launch", "all"):
        from megatron_croc.scaling.arm_launch import launch_arms

        failed = launch_arms(
            arms,
            only=options.arms,
            at_once=options.at_once,
            nice=options.nice,
            minutes=options.minutes,
        )
        if failed:
            return 1
    if options.command in ("report", "all"):
        from megatron_croc.scaling.arm_report import collect_results, write_arm_report

        page = write_arm_report(options.out, collect_results(arms))
        print(page.read_text(encoding="utf-8"))
    return 0


def plan(grid: Grid, out: Path) -> None:
    """Print and keep the table of runs, and the groups that are too small for a law."""
    from megatron_croc.scaling.collect import shortages
    from megatron_croc.scaling.price import price_table

    table = price_table(grid)
    for label, reason in shortages(grid).items():
        table += f"\n\nNo law can be fitted to {label or 'these runs'}: {reason}."
    (out / "plan.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def launch(grid: Grid, options: argparse.Namespace) -> bool:
    """Start what is not finished; whether nothing failed."""
    from megatron_croc.scaling.launch import launch_locally, write_slurm

    if not options.slurm:
        return not launch_locally(grid, at_once=options.at_once, nice=options.nice)
    script = write_slurm(
        grid,
        options.out,
        gpus_per_node=options.gpus_per_node,
        at_once=options.at_once,
        hours=options.hours,
        extra=options.sbatch,
    )
    if options.submit:
        return subprocess.run(["sbatch", str(script)], check=False).returncode == 0
    print(f"sbatch {script}")
    return True


def report(grid: Grid, options: argparse.Namespace, *, draw: bool) -> None:
    """Fit every group of runs; write fit.json, and the report."""
    from megatron_croc.scaling.report import fit_groups, write_json, write_report

    fits = fit_groups(grid, options.metric, resamples=options.resamples)
    write_json(options.out / "fit.json", fits, options.target_samples)
    if draw:
        write_report(options.out, fits, options.target_samples)
    print((options.out / ("report.md" if draw else "fit.json")).read_text(encoding="utf-8"))
