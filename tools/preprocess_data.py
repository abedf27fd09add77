#!/usr/bin/env python
"""Turn images and texts into a dataset folder for training; every worker count gives equal bytes.

    python tools/preprocess_data.py --input llava.json --image-folder images --output data/llava
    python tools/preprocess_data.py --input captions.jsonl --image-folder images --output data/cap
    python tools/preprocess_data.py --input hub_dataset/ --output data/hub        # parquet, or tars
    python tools/preprocess_data.py --index --input cc3m/*.tar --output data/cc3m # tars stay as is

A record is {"conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt", ...}],
"image": "a.jpg"}, or {"caption": "...", "image": "a.jpg"}; "image" may also be a list of names, or
be left out. Parquet rows and tars bring their images along. Records that cannot be trained on are
skipped; the reasons are printed, counted in report.json and all named in skipped.jsonl. Stopped at
any time, the same command goes on with the shards that are missing. With --tokenizer-model the
samples are measured too, as tools/index_lengths.py does.
"""

import argparse
import sys
import time
from pathlib import Path

from index_lengths import add_tokenizer_arguments, measure  # tools/ is on the path of its scripts
from tqdm import tqdm

from megatron_croc.data.build.inputs import FORMATS
from megatron_croc.data.build.preprocess import Preprocessor
from megatron_croc.data.build.shard_job import Report
from megatron_croc.data.build.tar_index import TarIndexer
from megatron_croc.errors import CrocError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    return parser.parse_args()


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


def main() -> None:
    """Do what is asked and say what became of the input."""
    arguments = parse_arguments()
    report = index(arguments) if arguments.index else make(arguments)
    for line in report.lines():
        print(line)
    if arguments.tokenizer_model is not None:
        measure(arguments.output, arguments)


if __name__ == "__main__":
    try:
        main()
    except CrocError as error:
        sys.exit(f"error: {error}")
