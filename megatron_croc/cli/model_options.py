"""Options that name a model and how it computes, the same for every command that generates."""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_croc.inference.generation import Generator


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --tokenizer, --dtype, --device and --trust-remote-code."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="export or checkpoint")
    add("--tokenizer", type=Path, help="default: the export's, or the run's")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--device", help="default: the accelerator, where there is one")
    add("--trust-remote-code", action="store_true", help="run an export's code that is not ours")


def open_model(options: argparse.Namespace) -> "AbstractContextManager[Generator]":
    """Load the model that the options name, see `open_generator`."""
    import torch

    from megatron_croc.inference.generation import open_generator

    return open_generator(
        options.model,
        tokenizer=options.tokenizer,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
