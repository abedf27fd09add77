"""Measure every sample of finished dataset folders, for packing, grouping and balancing.

    croc data lengths data/captions data/chat --tokenizer-model tokenizer.model

Tokens depend on tokenizer and template, so a folder gets one table for each pair; it is written
beside the shards and entered in manifest.json. Images are not read, shards are not changed. A table
says what --seq-length would cut off; --recipe takes seq_length and visual tokens from a run.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_croc.config.data import TokenizerType
from megatron_croc.config.parser import CommandParser
from megatron_croc.data.sample.conversation import TEMPLATES
from megatron_croc.data.store.manifest import read_manifest
from megatron_croc.data.truncation import TruncationCount
from megatron_croc.errors import ConfigError
from megatron_croc.recipes import get_recipe

SEQ_LENGTHS = (1024, 2048, 4096, 8192)
"""Lengths of the table that is printed when none is asked for."""

VISUAL_TOKENS = 576
"""Tokens of an image for CLIP ViT-L/14 at 336 pixels, the tower of Croc and LLaVA-1.5."""


def add_tokenizer_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options of tokenizer and template."""
    parser.add_argument("--tokenizer-model", required=required, help="file or folder")
    parser.add_argument(
        "--tokenizer-type",
        choices=["SentencePieceTokenizer", "HuggingFaceTokenizer"],
        help="default: SentencePieceTokenizer for a file, HuggingFaceTokenizer for a folder",
    )
    parser.add_argument("--conversation-template", choices=list(TEMPLATES), default="v1")
    parser.add_argument(
        "--recipe", metavar="NAME/STAGE", help="run to take seq_length and visual tokens from"
    )
    parser.add_argument(
        "--seq-length", type=int, help="count what it cuts off (default: of 1k, 2k, 4k and 8k)"
    )
    parser.add_argument(
        "--visual-tokens", type=int, help=f"tokens of an image (default {VISUAL_TOKENS})"
    )


def tokenizer_type(arguments: argparse.Namespace) -> TokenizerType:
    """The type that was given, or the one that a file or a folder has."""
    is_folder = Path(arguments.tokenizer_model).is_dir()
    guessed = "HuggingFaceTokenizer" if is_folder else "SentencePieceTokenizer"
    return arguments.tokenizer_type or guessed


def check_tokenizer(arguments: argparse.Namespace) -> None:
    """Load the tokenizer once, before hours of other work; DataError if it cannot be."""
    from megatron_croc.data.sample.tokenization import build_tokenizer  # torch

    build_tokenizer(tokenizer_type(arguments), arguments.tokenizer_model)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the lengths of one folder, with a progress bar."""
    from megatron_croc.data.prepare.lengths import index_lengths  # torch

    run = None if arguments.recipe is None else get_recipe(arguments.recipe)
    visual = arguments.visual_tokens
    if visual is None:
        visual = VISUAL_TOKENS if run is None else run.model.vision_tower.num_visual_tokens
    asked = arguments.seq_length
    if asked is None and run is not None:
        asked = run.data.seq_length
    if (asked is not None and asked < 1) or visual < 0:
        raise ConfigError("--seq-length must be positive, --visual-tokens not negative")
    counts = [TruncationCount(n) for n in (SEQ_LENGTHS if asked is None else (asked,))]
    parts = index_lengths(
        folder,
        tokenizer_type=tokenizer_type(arguments),
        tokenizer_model=arguments.tokenizer_model,
        template=arguments.conversation_template,
        num_workers=arguments.workers,
        num_visual_tokens=visual,
        truncation=counts,
    )
    total = read_manifest(folder).num_samples
    with tqdm(total=total, unit="sample", desc=f"lengths of {folder}", disable=None) as progress:
        for num_samples in parts:
            progress.update(num_samples)
    print(f"{folder}: lengths of {total} samples, an image as {visual} tokens (--visual-tokens)")
    for line in _truncation_lines(counts):
        print(line)


def _truncation_lines(counts: Sequence[TruncationCount]) -> Iterator[str]:
    """Format what one seq_length cuts off, or a table of several."""
    if len(counts) == 1:
        yield f"{'warning: ' * (counts[0].num_cut > 0)}{counts[0].describe()}"
        return
    yield f"{'seq_length':>10} {'cut':>9} {'labels lost':>12} {'no answer':>10} {'no images':>10}"
    for count in counts:
        yield (
            f"{count.seq_length:>10} {count.num_cut:>9} {count.share_lost:>12.1%} "
            f"{count.num_without_answer:>10} {count.num_images_split:>10}"
        )
    yield f"--seq-length {counts[0].proposed_seq_length} keeps 99% of the samples whole"


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
