"""Report on this machine: packages, kernels that training will use, problems and the way out.

    croc doctor                           this machine
    torchrun ... -m megatron_croc doctor --network           all ranks: all-reduce, clocks
    croc doctor --recipe croc_7b/pretrain_croc --disk checkpoints \
        --data-path data/captions --tokenizer-model tokenizer.model
    croc doctor --recipe croc_7b/pretrain_croc --world-size 16 --shards data/captions

Compares the memory that the run needs, for samples described as for `croc check`, with the GPUs
here, or with the RAM where there is none. Exits with 1 when something would make training fail.
"""

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_croc.cli.doctor.finding import Finding
from megatron_croc.cli.errors import reports_errors
from megatron_croc.cli.sample_options import add_sample_options, read_workload, sample_flags
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import CrocError
from megatron_croc.log import rank, world_size
from megatron_croc.planning.workload import Workload
from megatron_croc.recipes.command_line import parse_command, run_parser


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return the exit status."""
    parser = run_parser(prog="croc doctor", description=__doc__ or "")
    parser.add_argument("--brief", action="store_true", help="one line, and what is wrong")
    parser.add_argument("--network", action="store_true", help="measure over torchrun's ranks")
    parser.add_argument("--disk", metavar="FOLDER", help="measure where checkpoints will go")
    parser.add_argument(
        "--loader-seconds", type=float, default=5.0, help="reading time when --data-path is given"
    )
    parser.add_argument(
        "--world-size", type=int, help="processes of the run (default torchrun's, or the GPUs here)"
    )
    add_sample_options(parser)
    words = list(sys.argv[1:] if argv is None else argv)
    is_example = not any(word.startswith(("--recipe", "--config")) for word in words)
    if is_example:
        words += ["--recipe", "croc_7b/pretrain_croc"]
    options, run = parse_command(parser, words)
    workload = read_workload(options, run)
    found: list[Finding] = []
    for finding in examine(options, run, workload, is_example=is_example):
        found.append(finding)
        if rank() == 0 and not (options.brief and finding.level in ("ok", "note")):
            print(finding, flush=True)
    wrong = sum(finding.level == "error" for finding in found)
    if rank() == 0:
        verdict = f"{wrong} problem(s)" if wrong else "ready"
        devices = next(finding.text for finding in found if finding.subject in ("GPU", "device"))
        print(f"{platform.node()}: {verdict}; {devices}")
    return 1 if wrong else 0


def examine(
    options: argparse.Namespace, run: RunConfig, workload: Workload, *, is_example: bool
) -> Iterator[Finding]:
    """Everything the options ask for, cheap things first; a missing torch ends it."""
    from megatron_croc.cli.doctor.installed import look_at_packages

    packages = list(look_at_packages())
    yield from packages
    if any(finding.level == "error" for finding in packages):
        yield Finding("note", "device", "not looked at: packages are missing")
        return
    from megatron_croc.cli.doctor import accelerators, environment, machine, memory
    from megatron_croc.parallel.device import has_cuda

    yield from accelerators.look_at_devices()
    if has_cuda():
        yield from environment.look_at_environment()
    yield from accelerators.look_at_choices(run)
    yield memory.look_at_memory(
        run,
        workload,
        processes=options.world_size,
        is_example=is_example,
        samples=sample_flags(options),
    )
    if options.network:
        yield from _network(run, machine.look_at_network)
    if options.disk is not None:
        disk = machine.look_at_disk(Path(options.disk))
        yield disk
        if disk.level != "error":
            yield machine.look_at_checkpoint_size(run, Path(options.disk))
    if run.data.data_path:
        yield _loader(run, options.loader_seconds, machine.look_at_loader)


def _network(run: RunConfig, look) -> Iterator[Finding]:
    if world_size() == 1:
        yield Finding("note", "network", "one process", "start it with torchrun or srun")
        return
    import torch.distributed as dist

    from megatron_croc.parallel.groups import start_torch

    start_torch(run.parallel)
    yield from look()
    dist.destroy_process_group()


def _loader(run: RunConfig, seconds: float, look) -> Finding:
    try:
        return look(run, seconds)
    except CrocError as error:
        return Finding("error", "data", str(error))
