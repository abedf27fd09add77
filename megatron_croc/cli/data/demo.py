"""Draw a small data set to try everything on: images, JSON for every stage, a tokenizer.

    croc data demo --out demo

Two to four coloured shapes per image, and texts that say which, how many and where. The same
command gives the same bytes (with the same versions of Pillow and SentencePiece), whatever the
number of workers. Turn a JSON file into shards with `croc data preprocess`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_croc.atomic_files import write_atomically
from megatron_croc.cli.outputs import refuse_unwritable
from megatron_croc.config.parser import CommandParser
from megatron_croc.data.demo.dataset import train_tokenizer, write_annotations, write_images


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="croc data demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-images", type=int, default=4000, help="images to draw")
    parser.add_argument("--seed", type=int, default=1, help="of scenes and texts")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Images, then annotations, then the tokenizer."""
    arguments = parse_arguments(argv)
    refuse_unwritable("--out", arguments.out)
    print(f"drawing {arguments.num_images} images", file=sys.stderr, flush=True)
    images = write_images(
        arguments.out / "images",
        arguments.num_images,
        seed=arguments.seed,
        num_workers=arguments.workers,
    )
    for _ in tqdm(images, total=arguments.num_images, unit="image", disable=None):
        pass
    counts = write_annotations(arguments.out, arguments.num_images, seed=arguments.seed)
    for name, count in counts.items():
        print(f"{name}: {count} records")
    write_atomically(arguments.out / "tokenizer.model", train_tokenizer(seed=arguments.seed))
    print("tokenizer.model")
    return 0
