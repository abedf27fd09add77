"""Weights to and from Hugging Face: one process, no GPU, memory of a few tensors.

    croc convert import --from-hf vicuna-7b-v1.5 --vision clip --save start
    croc convert import --from-hf Croc-7B --save croc
    croc convert export --load runs/finetune --to croc-hf --tokenizer vicuna
    croc convert inspect FOLDER
    croc convert verify --load runs/finetune --hf croc-hf

`--load` takes a checkpoint (iter_0001000, release) or a folder of them, whose latest is meant.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.cli.errors import reports_errors
from megatron_croc.cli.outputs import refuse_unwritable
from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import CheckpointError

_DTYPES = ("float32", "bfloat16", "float16")


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, 1 also if a comparison failed."""
    arguments = _parser().parse_args(argv)
    _check_folders(arguments)
    if arguments.command is not _inspect:
        from megatron_croc.parallel.device import compute_on_cpu

        compute_on_cpu()
    return arguments.command(arguments)


def _check_folders(arguments: argparse.Namespace) -> None:
    """Refuse Hugging Face folders that are not there, by the name of their option."""
    for option in ("from_hf", "vision", "hf"):
        folder: Path | None = getattr(arguments, option, None)
        if folder is not None and not folder.is_dir():
            name = option.replace("_", "-")
            raise CheckpointError(f"--{name} {folder}: no such folder; give a downloaded model")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="croc convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="import|export|inspect|verify")

    one = commands.add_parser("import", help="Hugging Face -> a checkpoint to train from")
    one.add_argument("--from-hf", type=Path, required=True, metavar="DIR", help="weights to take")
    one.add_argument("--vision", type=Path, metavar="DIR", help="vision tower, where not in there")
    one.add_argument("--save", type=Path, required=True, metavar="DIR", help="gets release/")
    one.add_argument("--seed", type=int, default=1234, help="of what is drawn fresh")
    one.set_defaults(command=_import)

    one = commands.add_parser("export", help="a checkpoint -> a Hugging Face directory")
    one.add_argument("--load", type=Path, required=True, metavar="DIR", help="checkpoint")
    one.add_argument("--to", type=Path, required=True, metavar="DIR", help="must not exist")
    one.add_argument("--tokenizer", type=Path, help="SentencePiece file or directory")
    one.add_argument(
        "--layout",
        choices=("croc", "release"),
        default="croc",
        help="croc: for transformers, with its code (default). release: as the released code",
    )
    one.add_argument(
        "--training-parts", action="store_true", help="also the prompt pool and the head"
    )
    one.add_argument("--dtype", choices=_DTYPES, help="default: as in the checkpoint")
    one.add_argument("--max-shard-gb", type=float, default=2.0, help="largest file (default 2)")
    one.set_defaults(command=_export)

    one = commands.add_parser("inspect", help="what a folder holds, either kind")
    one.add_argument("folder", type=Path)
    one.set_defaults(command=_inspect)

    one = commands.add_parser("verify", help="run both on an image and a prompt, and compare")
    one.add_argument("--load", type=Path, required=True, metavar="DIR", help="checkpoint")
    one.add_argument("--hf", type=Path, required=True, metavar="DIR", help="its default export")
    one.add_argument("--image", type=Path, help="an image file; default: noise")
    one.add_argument("--prompt", default="Describe the picture in detail.")
    one.add_argument("--tokenizer", type=Path, help="default: random ids")
    one.add_argument("--dtype", choices=_DTYPES[:2], default="float32")
    one.set_defaults(command=_verify)
    return parser


def _import(arguments: argparse.Namespace) -> int:
    refuse_unwritable("--save", arguments.save)
    from megatron_croc.convert.importing import import_huggingface

    report = import_huggingface(
        arguments.from_hf, arguments.save, vision_folder=arguments.vision, seed=arguments.seed
    )
    print(f"{report.folder}: {report.num_tensors} tensors, {_gib(report.num_bytes)}")
    if report.fresh:
        print(f"not in the source, fresh: {', '.join(part.rstrip('.') for part in report.fresh)}")
    if report.ignored:
        print(f"not used: {len(report.ignored)} tensors ({report.ignored[0]}, ...)")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    refuse_unwritable("--to", arguments.to.parent)
    import torch

    from megatron_croc.convert.exporting import export_huggingface

    report = export_huggingface(
        arguments.load,
        arguments.to,
        layout=arguments.layout,
        training_parts=arguments.training_parts,
        tokenizer=arguments.tokenizer,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        max_shard_bytes=int(arguments.max_shard_gb * 10**9),
    )
    print(
        f"{report.checkpoint} -> {report.folder}: {report.num_tensors} tensors, "
        f"{_gib(report.num_bytes)}"
    )
    if report.left_out:
        print(f"left out, of training only: {len(report.left_out)} tensors (--training-parts)")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_croc.convert.inspecting import inspect_folder

    for line in inspect_folder(arguments.folder):
        print(line)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from megatron_croc.inference.verify import verify_export

    report = verify_export(
        arguments.load,
        arguments.hf,
        image=arguments.image,
        prompt=arguments.prompt,
        tokenizer=arguments.tokenizer,
        dtype=getattr(torch, arguments.dtype),
    )
    print("\n".join(report.lines()))
    return 0 if report.passed else 1


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
