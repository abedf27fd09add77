"""The command `croc`: finds the subcommand, runs it, and reports what the user can fix in one line.

A subcommand is a function that takes the words after its name and returns the exit status. Its
module is imported only when it is called, so that `croc --help` answers at once.
"""

import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata

from megatron_croc import __version__
from megatron_croc.cli.errors import print_error
from megatron_croc.errors import CrocError
from megatron_croc.log import rank

COMMANDS = {
    "train": ("train:main", "train one stage; under torchrun for more than one process"),
    "check": ("check:main", "batches, parameters and memory of a run, and if it fits a GPU"),
    "recipes": ("recipes:main", "the named complete configurations"),
    "doctor": ("doctor.command:main", "versions and devices here, and which of them are wrong"),
    "plan": ("plan:main", "the fastest layouts for a number of GPUs"),
    "rehearse": ("rehearse:main", "a training step of any job on one CPU, before a GPU is taken"),
    "convert": ("convert:main", "weights from and to Hugging Face: import, export, verify"),
    "generate": ("generate:main", "answers to questions about images"),
    "eval": ("eval:main", "metrics of a model on local tasks: yes or no, VQA, exact match"),
    "lmms-task": ("lmms_task:main", "a local task for lmms-eval"),
    "chat": ("chat:main", "a conversation with a model, in the terminal or a local page"),
    "serve": ("serve:main", "a model behind OpenAI's interface, with vLLM"),
    "data preprocess": ("data.preprocess:main", "images and texts to shards for training"),
    "data index": ("data.preprocess:index_main", "WebDataset tars for training, left in place"),
    "data lengths": ("data.lengths:main", "sample lengths, for packing, grouping, balancing"),
    "data check": ("data.check:main", "a look at the data before training, as a page"),
    "data inspect": ("data.inspect:main", "samples as the model will see them"),
    "data tokenizer": ("data.tokenizer:main", "a small tokenizer from your texts, for trials"),
    "data demo": ("data.demo:main", "a small made-up data set and tokenizer"),
    "parity golden": ("parity:golden", "a training step against a recorded run of released code"),
    "parity layouts": ("parity:layouts", "parallel layouts against one process"),
    "parity runs": ("parity:runs", "two training logs, step by step"),
    "parity transformers": ("parity:transformers", "an export under two versions of transformers"),
    "prove": ("prove:main", "all claims about a GPU, checked and measured in 25 minutes"),
    "checkpoint verify": ("checkpoint:verify", "which checkpoints are whole"),
    "chaos": ("chaos:main", "faults of every kind, and whether training survives them"),
    "scaling": ("scaling:main", "a grid of runs: price, launch, fit, report"),
    "monitor": ("monitor:main", "a running job in the terminal, or as a page"),
    "report": ("report:main", "pictures of what the stages of a run have learned"),
    "replay": ("replay:main", "a skipped step once more, to find its cause"),
}
"""Name -> function in megatron_croc.cli, and what the command shows or does."""

_NO_ACCESS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)
"""Errors of files that the user can fix: missing, not permitted, no room."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(describe_versions())
        return 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else " ".join(words[:1])
    try:
        if name in COMMANDS:
            return _function(name)(words[len(name.split()) :]) or 0
        return _list_commands(words)
    except CrocError as error:
        print_error(error)
        return 1
    except BrokenPipeError:  # `croc ... | head`: what is left to print has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _NO_ACCESS or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process, no traceback
        if rank() == 0:
            print(str(interrupt) or "stopped by Ctrl-C", file=sys.stderr)
        # torchrun starts workers again that end with another status than 0.
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 130


def describe_versions() -> str:
    """Versions of this package and of those whose numbers it depends on."""
    lines = [f"megatron_croc {__version__}"]
    for name in ("torch", "megatron-core", "transformer-engine"):
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


def _function(name: str) -> Callable[[Sequence[str]], int | None]:
    module, function = COMMANDS[name][0].split(":")
    return getattr(import_module(f"megatron_croc.cli.{module}"), function)


def _list_commands(words: Sequence[str]) -> int:
    """The overview, of one group when one is named; 2 when the words name no command."""
    asked = [word for word in words if word not in ("-h", "--help")][:2]
    group = {name: told for name, told in COMMANDS.items() if asked and name.split()[0] == asked[0]}
    if (asked and not group) or len(asked) == 2:
        close = difflib.get_close_matches(" ".join(asked), COMMANDS, n=1)
        hint = f"; did you mean croc {close[0]}?" if close else "; croc --help lists the commands"
        print(f"error: croc {' '.join(asked)}: no such command{hint}", file=sys.stderr)
        return 2
    shown = group or COMMANDS
    width = max(map(len, shown))
    print("croc COMMAND ...; croc COMMAND --help shows its options and an example\n")
    for name, (_, told) in shown.items():
        print(f"  {name:<{width}}  {told}")
    return 0
