"""Serve a trained model with vLLM, through OpenAI's interface.

    croc serve runs/finetune
    croc serve croc-hf --port 8001 --vllm /opt/vllm/bin/vllm -- --tensor-parallel-size 2

MODEL is an export, a checkpoint (iter_0001000, release) or a folder of them, whose latest is meant;
a checkpoint is exported to a temporary folder first (TMPDIR says where). The server gives the
answers of croc generate: training's prompts, its ends of answers, and the most likely token unless
a request has a temperature. Options after -- go to `vllm serve`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import CrocError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped; 1 after a fault that the user can fix."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    try:
        return _run(_parser().parse_args(words[:cut]), tuple(words[cut + 1 :]))
    except CrocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="croc serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="export or checkpoint")
    add("--host", default="127.0.0.1", help="default: this machine only")
    add("--port", type=int, default=8000)
    add("--name", default="croc", help="name of the model in requests (default croc)")
    add("--max-images", type=int, default=8, help="most images of a request (default 8)")
    add("--tokenizer", type=Path, help="for a checkpoint: default the run's")
    add("--vllm", metavar="PROGRAM", help="vllm of another environment, with this package in it")
    add("--dry-run", action="store_true", help="print the command and the example only")
    return parser


def _run(arguments: argparse.Namespace, more: tuple[str, ...]) -> int:
    from megatron_croc.inference.generation import as_export
    from megatron_croc.serving.server import (
        ServerSettings,
        check_export,
        example_request,
        find_vllm,
        run_server,
        server_command,
    )

    settings = ServerSettings(
        host=arguments.host,
        port=arguments.port,
        name=arguments.name,
        max_images=arguments.max_images,
        more=more,
    )
    vllm = "vllm" if arguments.dry_run else find_vllm(arguments.vllm)
    with as_export(arguments.model, arguments.tokenizer) as export:
        check_export(export)
        command = server_command(vllm, export, settings)
        print(shlex.join(command))
        print(f"\nwhen it is ready:\n{example_request(export, settings)}\n", flush=True)
        return 0 if arguments.dry_run else run_server(command)
