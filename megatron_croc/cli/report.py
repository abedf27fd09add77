"""Show what a run of the three stages learned: one HTML page with curves, masks and pool tokens.

    croc report RUN_DIR [--stages pretrain_mlp pretrain_croc finetune] [--images 4]

RUN_DIR holds one folder per stage, each the --save folder of its training. Call it from the folder
training was started in, since run.yaml remembers data paths as they were given. Writes
RUN_DIR/report/report.html, readable on its own, and its pictures as PNG files beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.cli.errors import reports_errors
from megatron_croc.config.parser import CommandParser
from megatron_croc.monitoring.run_report.report import pool_stage, write_report
from megatron_croc.monitoring.run_report.stages import as_text, check_files, load_stage, loss_table

STAGES = ("pretrain_mlp", "pretrain_croc", "finetune")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="croc report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="holds a folder per stage")
    parser.add_argument("--stages", nargs="+", default=STAGES, help="folders to report, in order")
    parser.add_argument("--images", type=int, default=4, help="held-out images to show")
    return parser.parse_args(argv)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; return the exit status."""
    arguments = parse_arguments(argv)
    try:
        stages = [load_stage(arguments.run_dir, name) for name in arguments.stages]
        for stage in (stages[-1], pool_stage(stages)):
            if stage is not None:
                check_files(stage)
        print(as_text(loss_table(stages)), flush=True)
        page = write_report(arguments.run_dir, stages, num_images=max(1, arguments.images))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("error: matplotlib is not installed: pip install -e '.[dev]'", file=sys.stderr)
        return 1
    print(f"report: {page}")
    return 0
