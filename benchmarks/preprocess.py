#!/usr/bin/env python
"""CPU time of preprocessing: 4,000 records as JSON, as JSONL, as a tar, and a tar that is indexed.

    python benchmarks/preprocess.py                            # about two minutes on one core
    python benchmarks/preprocess.py --against ../older         # in turn with another checkout

Records have one small JPEG and two questions, or a caption, so that the cost of the rules is seen
and not that of reading pixels. Each measurement is one job in a process of its own, without the
time of imports; the two checkouts take turns, and the ratio is formed pair by pair.
"""

import argparse
import importlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WAYS = ("json", "jsonl", "tar", "index")


def write_inputs(folder: Path, num_records: int) -> None:
    """Images, a JSON list, JSONL of the same records, and a tar with captions."""
    import numpy as np
    from PIL import Image

    records = []
    (folder / "images").mkdir(parents=True)
    with tarfile.open(folder / "input.tar", "w") as tar:
        for number in range(num_records):
            pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).resize((160, 120)).save(buffer, "JPEG")
            (folder / "images" / f"{number:06d}.jpg").write_bytes(buffer.getvalue())
            turns = [
                {"from": "human", "value": "<image>\nWhat is in the picture, and where?"},
                {"from": "gpt", "value": f"A red circle stands left of a blue square. {number}"},
                {"from": "human", "value": "How many shapes are there in all?"},
                {"from": "gpt", "value": "There are two shapes, a circle and a square."},
            ]
            record = {"id": f"{number:06d}", "image": f"{number:06d}.jpg", "conversations": turns}
            records.append(record)
            caption = {"caption": turns[1]["value"], "width": 160, "height": 120, "key": number}
            for suffix, data in (
                ("jpg", buffer.getvalue()),
                ("json", json.dumps(caption).encode()),
            ):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "input.json").write_text(json.dumps(records))
    (folder / "input.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def module_of(*names: str):
    """The first of some modules that there is; older checkouts have other folders."""
    for name in names:
        try:
            return importlib.import_module(f"megatron_croc.data.{name}")
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(names[0])


def run_job(way: str, folder: Path, output: Path) -> None:
    """Do one job in this process and print its seconds of CPU."""
    preprocess = module_of("prepare.preprocess", "preprocess")
    tar_index = module_of("prepare.tar_index", "tar_index")
    began = time.process_time()
    if way == "index":
        job = tar_index.TarIndexer(input_path=[folder / "input.tar"], output=output)
        made = job.make_indices(1)
    else:
        job = preprocess.Preprocessor(
            input_path=folder / f"input.{way}",
            image_folder=None if way == "tar" else folder / "images",
            output=output,
            samples_per_shard=1000,
        )
        made = job.make_shards(1)
    list(made)
    report = job.finish()
    took = time.process_time() - began
    assert report.num_samples == report.num_images > 0, list(report.lines())
    print(took)


def measure(way: str, folder: Path, checkout: Path, number: int) -> float:
    """CPU seconds of one job of a checkout."""
    output = folder / f"out-{way}-{number}-{abs(hash(checkout))}"
    output.mkdir()
    command = [sys.executable, __file__, "--job", way, str(folder), str(output)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def table(found: dict[str, list[tuple[float, ...]]]) -> Iterator[str]:
    """Lines for people: medians of CPU seconds, and ratios with their range."""
    yield "way     CPU s here      CPU s there      here / there, pair by pair"
    for way, pairs in found.items():
        here = [pair[0] for pair in pairs]
        line = f"{way:<7} {statistics.median(here):.2f} ({min(here):.2f}-{max(here):.2f})"
        if len(pairs[0]) > 1:
            there = [pair[1] for pair in pairs]
            ratios = sorted(pair[0] / pair[1] for pair in pairs)
            line += (
                f"  {statistics.median(there):.2f} ({min(there):.2f}-{max(there):.2f})"
                f"  {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            )
        yield line


def main() -> None:
    """Measure, print and keep the figures."""
    if sys.argv[1:2] == ["--job"]:
        run_job(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each way")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--out", type=Path, help="folder of preprocess.json; default: none")
    options = parser.parse_args()
    checkouts = [Path(__file__).resolve().parents[1]]
    if options.against is not None:
        checkouts.append(options.against.resolve())
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), options.records)
        for number in range(options.pairs):
            for way in options.ways:
                pair = {
                    checkout: measure(way, Path(name), checkout, number)
                    for checkout in (checkouts if number % 2 == 0 else checkouts[::-1])
                }
                found[way].append(tuple(pair[checkout] for checkout in checkouts))
    print("\n".join(table(found)))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "records": options.records,
            "cpu_seconds": found,
        }
        (options.out / "preprocess.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
