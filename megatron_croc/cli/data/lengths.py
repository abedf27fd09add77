"""Measure every sample of finished dataset folders, for --packing and --group-by-modality-length.

    croc data lengths data/captions data/chat --tokenizer-model tokenizer.model

Tokens depend on tokenizer and template, so a folder gets one table for each pair; it is written
beside the shards and entered in manifest.json. Images are not read, shards are not changed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_croc.config.parser import CommandParser
from megatron_croc.data.prepare.lengths import TokenizerType, index_lengths
from megatron_croc.data.sample.conversation import TEMPLATES
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.store.manifest import read_manifest


def add_tokenizer_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options of tokenizer and template."""
    parser.add_argument("--tokenizer-model", required=required, help="file or folder")
    parser.add_argument(
        "--tokenizer-type",
        choices=["SentencePieceTokenizer", "HuggingFaceTokenizer"],
        help="default: SentencePieceTokenizer for a file, HuggingFaceTokenizer for a folder",
    )
    parser.add_argument("--conversation-template", choices=list(TEMPLATES), default="v1")


def tokenizer_type(arguments: argparse.Namespace) -> TokenizerType:
    """The type that was given, or the one that a file or a folder has."""
    is_folder = Path(arguments.tokenizer_model).is_dir()
    guessed = "HuggingFaceTokenizer" if is_folder else "SentencePieceTokenizer"
    return arguments.tokenizer_type or guessed


def check_tokenizer(arguments: argparse.Namespace) -> None:
    """Load the tokenizer once, before hours of other work; DataError if it cannot be."""
    build_tokenizer(tokenizer_type(arguments), arguments.tokenizer_model)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the lengths of one folder, with a progress bar."""
    parts = index_lengths(
        folder,
        tokenizer_type=tokenizer_type(arguments),
        tokenizer_model=arguments.tokenizer_model,
        template=arguments.conversation_template,
        num_workers=arguments.workers,
    )
    total = read_manifest(folder).num_samples
    with tqdm(total=total, unit="sample", desc=f"lengths of {folder}", disable=None) as progress:
        for num_samples in parts:
            progress.update(num_samples)
    print(f"{folder}: lengths of {total} samples")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the folders one after the other."""
    parser = CommandParser(
        prog="croc data lengths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", help="finished dataset folders")
    add_tokenizer_arguments(parser, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    arguments = parser.parse_args(argv)
    for folder in arguments.folders:
        measure(folder, arguments)
    return 0
