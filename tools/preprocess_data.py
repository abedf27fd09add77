#!/usr/bin/env python
"""Turn a LLaVA-style JSON file and a folder of images into shards for training.

    python tools/preprocess_data.py --input llava.json --image-folder images --output data/llava

Each record is {"conversations": [{"from": "human", "value": "<image> ..."}, {"from": "gpt", ...}],
"image": "a.jpg"}; "image" may also be a list of names, or be left out. Records that cannot be
trained on are skipped; the reasons are printed and kept in report.json. Stopped at any time, the
same command goes on with the shards that are missing. With --tokenizer-model the samples are
measured too, as tools/index_lengths.py does.
"""

import argparse
import sys
from pathlib import Path

from index_lengths import add_tokenizer_arguments, measure  # tools/ is on the path of its scripts
from tqdm import tqdm

from megatron_croc.data.preprocess import Preprocessor
from megatron_croc.errors import CrocError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="JSON list of records")
    parser.add_argument(
        "--image-folder", type=Path, required=True, help="what image names are relative to"
    )
    parser.add_argument("--output", type=Path, required=True, help="dataset folder to write")
    parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, help="records of one shard"
    )
    add_tokenizer_arguments(parser, required=False)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    return parser.parse_args()


def main() -> None:
    """Make the shards that are missing, then the manifest."""
    arguments = parse_arguments()
    job = Preprocessor(
        input_path=arguments.input,
        image_folder=arguments.image_folder,
        output=arguments.output,
        samples_per_shard=arguments.samples_per_shard,
    )
    total = len(job.unfinished_shards()) * arguments.samples_per_shard
    with tqdm(total=min(total, len(job.records)), unit="record", disable=None) as progress:
        for num_records in job.make_shards(arguments.workers):
            progress.update(num_records)
    for line in job.finish().lines():
        print(line)
    if arguments.tokenizer_model is not None:
        measure(arguments.output, arguments)


if __name__ == "__main__":
    try:
        main()
    except CrocError as error:
        sys.exit(f"error: {error}")
