"""Ask a trained model: one question, or a file of them.

    croc generate --model runs/finetune --image a.jpg --prompt "What is it?"
    croc generate --model croc-hf --input questions.jsonl \\
        --image-folder images --output answers.jsonl --batch-size 16
    croc generate --model runs/finetune --input valid.json \\
        --image-folder images --report accuracy.json --baseline train.json

`--model` takes an export, a checkpoint (iter_0001000, release) or a folder of them, whose latest is
meant; a checkpoint is exported to a temporary folder first (TMPDIR says where). Without
--temperature the most likely token is taken. Input with true answers gives a report of accuracy
by type of question.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_croc.atomic_files import why_unwritable
from megatron_croc.cli.errors import reports_errors
from megatron_croc.cli.model_options import add_model_options, open_model
from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import ConfigError

if TYPE_CHECKING:
    from megatron_croc.evaluation.prompts import Answer
    from megatron_croc.evaluation.questions import Question
    from megatron_croc.inference.generation import Generator, Sampling


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Answer questions; return the exit status."""
    return _run(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="croc generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_options(parser)
    add("--prompt", help="the question; <image> marks may say where the images stand")
    add("--image", type=Path, action="append", default=[], help="an image; may be repeated")
    add("--input", type=Path, metavar="FILE", help="JSON lines of questions, or LLaVA's JSON")
    add("--image-folder", type=Path, metavar="DIR", help="default: beside the input")
    add("--output", type=Path, metavar="FILE", help="JSON lines of answers; must not exist")
    add("--report", type=Path, metavar="FILE", help="accuracy by type of question, as JSON")
    add("--baseline", type=Path, metavar="FILE", help="training JSON, for the chance level")
    add("--batch-size", type=int, default=8, help="questions at a time (default 8)")
    add("--max-new-tokens", type=int, default=512)
    add("--temperature", type=float, default=0.0, help="default 0: the most likely token")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--seed", type=int, default=1234)
    add("--no-cache", action="store_true", help="compute every token anew, to compare")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    print(f"loading {arguments.model}", file=sys.stderr, flush=True)
    from megatron_croc.inference.generation import Sampling

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        use_cache=not arguments.no_cache,
    )
    questions = _questions(arguments)
    with open_model(arguments) as generator:
        generator.check(questions, sampling)
        answers = list(_answers(generator, questions, sampling, arguments))
    if arguments.report is not None:
        _report(answers, arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """ConfigError for settings that contradict each other."""
    if (arguments.prompt is None) == (arguments.input is None):
        raise ConfigError("give either --prompt or --input")
    if arguments.input is None and (arguments.report or arguments.output):
        raise ConfigError("--output and --report go with --input")
    if arguments.input is not None and arguments.image:
        raise ConfigError("--image goes with --prompt; an --input names its images itself")
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size}: must be positive")
    if arguments.baseline is not None and arguments.report is None:
        raise ConfigError("--baseline goes with --report")
    if arguments.output is not None and arguments.output.exists():
        raise ConfigError(f"--output {arguments.output}: exists already; remove it or name another")
    for path in (arguments.output, arguments.report):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
        if path is not None and (reason := why_unwritable(path.parent)) is not None:
            raise ConfigError(f"{path}: cannot be written ({reason}); name another")


def _questions(arguments: argparse.Namespace) -> "list[Question]":
    from megatron_croc.evaluation.questions import ask, read_questions

    if arguments.input is None:
        return [ask(arguments.prompt, arguments.image)]
    questions = read_questions(arguments.input, arguments.image_folder)
    if arguments.report is not None and all(q.expected is None for q in questions):
        raise ConfigError(f"--report: {arguments.input} has no true answers to compare with")
    return questions


def _answers(
    generator: "Generator",
    questions: "list[Question]",
    sampling: "Sampling",
    arguments: argparse.Namespace,
) -> "Iterator[Answer]":
    """Answer; each is shown or written as soon as it is there."""
    from tqdm import tqdm

    from megatron_croc.inference.answers import as_record

    answers = generator.answer(questions, sampling, batch_size=arguments.batch_size)
    if arguments.input is None:
        for answer in answers:
            print(answer.text)
            yield answer
        return
    shown = tqdm(answers, total=len(questions), unit="question", disable=None)
    if arguments.output is None:
        yield from shown
        return
    with arguments.output.open("w", encoding="utf-8", buffering=1) as file:
        for answer in shown:
            file.write(json.dumps(as_record(answer), ensure_ascii=False) + "\n")
            yield answer


def _report(answers: "list[Answer]", arguments: argparse.Namespace) -> None:
    from megatron_croc.evaluation.questions import read_questions
    from megatron_croc.inference.answers import accuracy_by_type, as_table, write_report

    known = None
    if arguments.baseline is not None:
        known = read_questions(arguments.baseline, opens_images=False)
    rows = accuracy_by_type(answers, known)
    write_report(arguments.report, rows)
    print("\n".join(as_table(rows)))
