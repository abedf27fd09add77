"""Turn images and texts into a dataset folder for training; every worker count gives equal bytes.

    croc data preprocess --input llava.json --image-folder images --output data/llava
    croc data preprocess --input captions.jsonl --image-folder images --output data/cap
    croc data preprocess --input hub_dataset/ --output data/hub    # parquet, tars, or metadata.csv
    croc data index --input cc3m/*.tar --output data/cc3m # tars stay as is

A record is {"conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt", ...}],
"image": "a.jpg"}, or {"caption": "...", "image": "a.jpg"}, or a form of docs/data.md; "image" may
also be a list of names, or be left out. Parquet rows and tars bring their images along. A field
that speaks of an image is read, or its record is skipped. Records that cannot be trained on are
skipped; the reasons are printed, counted in report.json and all named in skipped.jsonl. Stopped at
any time, the same command goes on with the shards that are missing. With --tokenizer-model the
samples are measured too, as `croc data lengths` does.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_croc.cli.data.lengths import add_tokenizer_arguments, check_tokenizer, measure
from megatron_croc.cli.outputs import refuse_unwritable
from megatron_croc.config.parser import CommandParser
from megatron_croc.data.prepare.inputs import FORMATS
from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.prepare.shard_job import Report
from megatron_croc.data.prepare.tar_index import TarIndexer
from megatron_croc.data.records.fields import FieldRules
from megatron_croc.errors import ConfigError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="croc data preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders, globs, or s3:// prefixes of tars"
    )
    parser.add_argument("--split", nargs="+", default=(), help="splits to take, or all (train)")
    parser.add_argument(
        "--rename", nargs="+", default=(), metavar="OLD=NEW", help="fields to read as others"
    )
    parser.add_argument(
        "--ignore", nargs="+", default=(), metavar="FIELD", help="fields or suffixes to leave out"
    )
    parser.add_argument(
        "--image-aspect-ratio",
        choices=("pad", "square"),
        default="pad",
        help="as in training, which refuses some long images (default pad)",
    )
    parser.add_argument("--input-format", choices=FORMATS, help="default: told by the suffix")
    parser.add_argument("--image-folder", type=Path, help="what image names are relative to")
    parser.add_argument("--output", type=Path, required=True, help="dataset folder to write")
    parser.add_argument(
        "--index", action="store_true", help="index WebDataset tars in place, rewriting nothing"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, help="records of one shard"
    )
    add_tokenizer_arguments(parser, required=False)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    return parser.parse_args(argv)


def make(arguments: argparse.Namespace) -> Report:
    """Make the shards that are missing, then the manifest."""
    job = Preprocessor(
        input_path=arguments.input,
        image_folder=arguments.image_folder,
        output=arguments.output,
        samples_per_shard=arguments.samples_per_shard,
        input_format=arguments.input_format,
        split=arguments.split,
        rules=FieldRules.parse(arguments.rename, arguments.ignore),
        image_aspect_ratio=arguments.image_aspect_ratio,
    )
    if job.note is not None:
        print(job.note)
    with tqdm(total=job.num_unfinished, unit="record", disable=None) as progress:
        for num_records in job.make_shards(arguments.workers):
            progress.update(num_records)
    return job.finish()


def index(arguments: argparse.Namespace) -> Report:
    """Index the tars that are left, then write the manifest."""
    if arguments.rename or arguments.ignore:
        raise ConfigError(
            "--rename and --ignore do not go with indexing, which leaves texts as they are: make "
            "shards (croc data preprocess without --index)"
        )
    job = TarIndexer(input_path=arguments.input, output=arguments.output, split=arguments.split)
    if job.note is not None:
        print(job.note)
    total, begin = job.num_unfinished_bytes, time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
        for num_bytes in job.make_indices(arguments.workers):
            progress.update(num_bytes)
    seconds = time.monotonic() - begin
    print(f"{total / 1e6:.1f} MB in {seconds:.1f} s ({total / 1e6 / max(seconds, 1e-9):.0f} MB/s)")
    return job.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked and say what became of the input."""
    arguments = parse_arguments(argv)
    if arguments.tokenizer_model is None and (arguments.recipe or arguments.seq_length):
        raise ConfigError(
            "--recipe and --seq-length ask what a cut would remove: give --tokenizer-model too"
        )
    refuse_unwritable("--output", arguments.output)
    if arguments.tokenizer_model is not None:
        check_tokenizer(arguments)  # not only after all shards
    report = index(arguments) if arguments.index else make(arguments)
    for line in report.lines():
        print(line)
    if arguments.tokenizer_model is not None:
        measure(arguments.output, arguments)
    return 0


def index_main(argv: Sequence[str]) -> int:
    """`croc data index`: the same with --index."""
    return main(["--index", *argv])
