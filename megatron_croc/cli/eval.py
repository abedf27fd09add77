"""Evaluate a trained model on local tasks: questions with true answers, from files.

    croc eval --model runs/finetune --task existence.yaml --task vqa.yaml --output results

A task file is YAML: `task` (its name), `kind` (pope, vqa or exact_match), `questions` (as croc
generate --input), and if need be `images`, `post_prompt`, `max_new_tokens`; see
megatron_croc/evaluation/tasks.py. `--model` is an export or a checkpoint, as for croc generate,
whose answers are the same. Prints a table by type of question; --output also keeps TASK.json
(metrics) and TASK.jsonl (answers).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_croc.atomic_files import why_unwritable, write_atomically
from megatron_croc.cli.errors import reports_errors
from megatron_croc.cli.model_options import add_model_options, open_model
from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import ConfigError

if TYPE_CHECKING:
    from megatron_croc.evaluation.prompts import Answer
    from megatron_croc.evaluation.tasks import CategoryResult, EvalTask


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; return the exit status."""
    parser = CommandParser(
        prog="croc eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_options(parser)
    add("--task", type=Path, action="append", required=True, metavar="FILE", help="may be repeated")
    add("--batch-size", type=int, default=8, help="questions at a time (default 8)")
    add("--output", type=Path, metavar="DIR", help="folder of results; made if need be")
    return _run(parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from tqdm import tqdm

    from megatron_croc.evaluation.tasks import as_table, measure, read_tasks
    from megatron_croc.inference.generation import Sampling

    tasks = read_tasks(arguments.task)
    for path in _outputs(arguments.output, tasks):
        if path.exists():
            raise ConfigError(f"--output: {path} exists already; remove it or name another folder")
    print(f"loading {arguments.model}", file=sys.stderr, flush=True)
    with open_model(arguments) as generator:
        for task in tasks:
            generator.check(task.questions, Sampling(max_new_tokens=task.max_new_tokens))
        for task in tasks:
            sampling = Sampling(max_new_tokens=task.max_new_tokens)
            answers = generator.answer(task.questions, sampling, batch_size=arguments.batch_size)
            shown = tqdm(answers, task.name, len(task.questions), unit="question", disable=None)
            said = list(shown)
            results = measure(task, [answer.text for answer in said])
            print("\n".join(as_table(task, results)), flush=True)
            if arguments.output is not None:
                _write(arguments, task, said, results)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """ConfigError for options that cannot be followed."""
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size}: must be positive")
    folder = arguments.output
    if folder is not None and (reason := why_unwritable(folder)) is not None:
        raise ConfigError(f"--output {folder}: cannot be written ({reason}); name another")


def _outputs(folder: Path | None, tasks: "Sequence[EvalTask]") -> list[Path]:
    names = (f"{task.name}{end}" for task in tasks for end in (".json", ".jsonl"))
    return [] if folder is None else [folder / name for name in names]


def _write(
    arguments: argparse.Namespace,
    task: "EvalTask",
    answers: "Sequence[Answer]",
    results: "Sequence[CategoryResult]",
) -> None:
    """Write TASK.jsonl, then TASK.json."""
    from megatron_croc.inference.answers import as_record

    arguments.output.mkdir(parents=True, exist_ok=True)
    metrics, lines = _outputs(arguments.output, [task])
    records = (json.dumps(as_record(answer), ensure_ascii=False) + "\n" for answer in answers)
    write_atomically(lines, "".join(records).encode())
    *categories, everything = results
    content = {
        "task": task.name,
        "kind": task.kind,
        "model": str(arguments.model),
        "num_questions": everything.num_questions,
        "max_new_tokens": task.max_new_tokens,
        "metrics": everything.metrics,
        "categories": {
            row.category: {"num_questions": row.num_questions, **row.metrics} for row in categories
        },
    }
    write_atomically(metrics, (json.dumps(content, indent=1) + "\n").encode())
