"""Write local tasks as tasks of lmms-eval, which then judges any model it knows on them.

    croc lmms-task --task existence.yaml --to lmms-tasks
    lmms-eval --model croc --model_args pretrained=croc-hf --include_path lmms-tasks \\
        --tasks existence --batch_size 8

The task files are those of croc eval. Images stay where they are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.atomic_files import why_unwritable
from megatron_croc.cli.errors import reports_errors
from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import ConfigError


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Write the tasks; return the exit status."""
    parser = CommandParser(
        prog="croc lmms-task",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", type=Path, action="append", required=True, metavar="FILE", help="may be repeated")
    add("--to", type=Path, required=True, metavar="DIR", help="folder; made if need be")
    arguments = parser.parse_args(argv)
    if (reason := why_unwritable(arguments.to)) is not None:
        raise ConfigError(f"--to {arguments.to}: cannot be written ({reason}); name another")
    from megatron_croc.evaluation.tasks import read_tasks
    from megatron_croc.inference.lmms_task import write_lmms_task

    for task in read_tasks(arguments.task):
        print(write_lmms_task(task, arguments.to))
    return 0
