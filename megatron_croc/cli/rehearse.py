"""A training step of any job on one CPU: memory, communication and faults, before a GPU is taken.

    croc rehearse --recipe croc_7b/pretrain_croc --world-size 64 --pipeline-model-parallel-size 4
    croc rehearse --config run.yaml --world-size 512 --data data/captions --out rehearsal
    croc rehearse --recipe victor_7b/finetune --world-size 16 --text-tokens 400

Each class of ranks (pipeline stage, first or another tensor-, context-, data-parallel rank) is a
process that runs the real model, optimizer and schedule on CUDA tensors that hold no data. Without
--data and --text-tokens every micro-batch is the largest that `croc check` expects. Exits 1 after a
fault. docs/rehearsal.md says what this proves and what it cannot see.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_croc.cli.errors import reports_errors
from megatron_croc.config.base import raise_faults
from megatron_croc.config.checks import find_faults
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.planning.gpus import GPUS, get_gpu
from megatron_croc.planning.workload import from_numbers
from megatron_croc.recipes.command_line import parse_command, run_parser
from megatron_croc.rehearsal.findings import Findings, gather
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.page import as_page
from megatron_croc.rehearsal.replay.chrome_trace import write_chrome_trace
from megatron_croc.rehearsal.replay.costs import read_costs
from megatron_croc.rehearsal.replay.picture import draw_timeline
from megatron_croc.rehearsal.report import as_json, lines
from megatron_croc.rehearsal.run import MAX_WORLD, Rehearsal, children_at_once, perform
from megatron_croc.rehearsal.versions import require_rehearsable


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse, and print the report; return the exit status, 1 after a fault."""
    parser = run_parser(prog="croc rehearse", description=__doc__ or "")
    add = parser.add_argument
    add("--world-size", type=int, default=8, help="GPUs of the job (default 8)")
    add("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default h100)")
    add("--data", nargs="+", metavar="SHARDS", help="folders to take the rows of a step from")
    add("--text-tokens", type=float, help="draw samples of this mean length instead")
    add("--text-spread", type=float, default=0.5, help="sd of the log of it (default 0.5)")
    add("--images", type=float, default=1.0, help="mean of a sample (default 1)")
    add("--jobs", type=int, help="processes at once (default: one a core, as memory allows)")
    add("--time-limit", type=float, default=60.0, help="minutes for all of it (default 60)")
    add("--costs", type=Path, metavar="TABLE.json", help="measured costs, for the predicted time")
    add("--out", type=Path, metavar="FOLDER", help="write report.json, report.html and traces here")
    add("--json", action="store_true", help="print JSON")
    options, run = parse_command(parser, argv)
    run, rows = _rows(options, run)
    _check(options, run)
    run = replace(run, training=replace(run.training, transformer_impl="local"))
    with _folder(options.out) as folder:
        rehearsal = Rehearsal(
            run=run,
            world_size=options.world_size,
            gpu=options.gpu,
            rows=rows,
            folder=folder,
            costs=options.costs,
        )
        perform(
            rehearsal,
            at_once=children_at_once(options.jobs),
            time_limit=60.0 * options.time_limit,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        findings = gather(rehearsal)
        text = as_json(rehearsal, findings)
        if options.out is not None:
            _write(options.out, rehearsal, findings, text)
        print(text if options.json else "\n".join(lines(rehearsal, findings)).lstrip("\n"))
    return 1 if findings.faults else 0


def _write(folder: Path, rehearsal: Rehearsal, findings: Findings, text: str) -> None:
    """Write the report as JSON and as a page, and the step for chrome://tracing or Perfetto."""
    (folder / "report.json").write_text(text)
    (folder / "report.html").write_text(as_page(rehearsal, findings))
    if findings.timeline is not None:
        write_chrome_trace(folder / "step.trace.json", findings.timeline)
        (folder / "step.svg").write_text(draw_timeline(findings.timeline))


def _rows(options: argparse.Namespace, run: RunConfig) -> tuple[RunConfig, Rows]:
    """Origin of the rows, and the run with --data as its data."""
    numbers = {
        "text_tokens": options.text_tokens or 200.0,
        "text_spread": options.text_spread,
        "images": options.images,
    }
    if options.data is not None:
        if options.text_tokens is not None:
            raise ConfigError("--data and --text-tokens both say what a row is; give one of them")
        run = replace(run, data=replace(run.data, data_path=tuple(options.data)))
        return run, Rows(kind="data", **numbers)
    return run, Rows(kind="longest" if options.text_tokens is None else "drawn", **numbers)


def _check(options: argparse.Namespace, run: RunConfig) -> None:
    """Refuse what cannot be rehearsed, before a child starts."""
    if not 1 <= options.world_size <= MAX_WORLD:
        raise ConfigError(f"--world-size {options.world_size}: must lie between 1 and {MAX_WORLD}")
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: must be 1 or more")
    if options.time_limit <= 0:
        raise ConfigError(f"--time-limit {options.time_limit:g}: must be above 0")
    get_gpu(options.gpu)
    if options.costs is not None:
        read_costs(options.costs)
    raise_faults(find_faults(run, options.world_size, for_training=False))
    from_numbers(
        run,
        text_tokens=200.0 if options.text_tokens is None else options.text_tokens,
        images=options.images,
        spread=options.text_spread,
    )
    if options.data is not None:
        from megatron_croc.data.order.blend import read_blend  # numpy: only where there is data

        read_blend(run.data.data_path)
    require_rehearsable(run.training)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Folder for the children's files: one of --out that stays, or one that is deleted."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
            yield Path(name)
        return
    traces = out / "ranks"
    traces.mkdir(parents=True, exist_ok=True)
    yield traces
