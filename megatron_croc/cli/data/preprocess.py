"""Turn images and texts into a dataset folder for training; every worker count gives equal bytes.

    croc data preprocess --input llava.json --image-folder images --output data/llava
    croc data preprocess --input captions.jsonl --image-folder images --output data/cap
    croc data preprocess --input hub_dataset/ --output data/hub        # parquet, or tars
    croc data index --input cc3m/*.tar --output data/cc3m # tars stay as is

A record is {"conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt", ...}],
"image": "a.jpg"}, or {"caption": "...", "image": "a.jpg"}; "image" may also be a list of names, or
be left out. Parquet rows and tars bring their images along. Records that cannot be trained on are
skipped; the reasons are printed, counted in report.json and all named in skipped.jsonl. Stopped at
any time, the same command goes on with the shards that are missing. With --tokenizer-model the
samples are measured too, as `croc data lengths` does.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_croc.atomic_files import why_unwritable
from megatron_croc.cli.data.lengths import add_tokenizer_arguments, check_tokenizer, measure
from megatron_croc.config.parser import CommandParser
from megatron_croc.data.prepare.inputs import FORMATS
from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.prepare.shard_job import Report
from megatron_croc.data.prepare.tar_index import TarIndexer
from megatron_croc.errors import DataError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="croc data preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", required=True, help="file, files, or a folder of parquet or tars"
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
    )
    with tqdm(total=job.num_unfinished, unit="record", disable=None) as progress:
        for num_records in job.make_shards(arguments.workers):
            progress.update(num_records)
    return job.finish()


def index(arguments: argparse.Namespace) -> Report:
    """Index the tars that are left, then write the manifest."""
    job = TarIndexer(input_path=arguments.input, output=arguments.output)
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
    if (reason := why_unwritable(arguments.output)) is not None:
        raise DataError(
            f"--output {arguments.output}: cannot be written ({reason}); name another folder"
        )
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
