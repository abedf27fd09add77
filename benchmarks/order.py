#!/usr/bin/env python
"""Cost of the order of samples at scale: resume at sample 10^9, and planning speed.

    python benchmarks/order.py --folder /tmp/order_at_scale

Makes a dataset folder of 1.2 x 10^9 samples out of nothing (12,000 shards of 100,000: sparse files
that hold holes instead of images; the real index of a shard is written once and linked to), then
resumes in a fresh process from a state at sample 10^9 of each arrangement and prints the time until
the first global batch of rows is planned, its samples are located, and the peak memory.
"""

import argparse
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_croc.data.store.shard_writer import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    LengthsInfo,
    ShardInfo,
    shard_name,
)

SHARDS, PER_SHARD = 12_000, 100_000
SAMPLE_BYTES = 100_000
POSITION = 10**9
GLOBAL_BATCH_SIZE = 1024
KINDS = ("separate", "grouped", "packed", "balanced")


def make_folder(folder: Path) -> None:
    """Manifest, linked indexes, sparse tars and a sparse table of lengths."""
    folder.mkdir(parents=True)
    first = np.arange(PER_SHARD) * SAMPLE_BYTES
    json_rows = np.stack([np.arange(PER_SHARD), first + 512, np.full(PER_SHARD, 600)], axis=1)
    image_rows = json_rows + np.array([0, 2048, 90_000 - 600])
    buffer = io.BytesIO()
    np.save(buffer, np.stack([json_rows, image_rows], axis=1).reshape(-1, 3))
    index = buffer.getvalue()
    (folder / "index").write_bytes(index)
    tar_bytes = PER_SHARD * SAMPLE_BYTES
    with open(folder / "tar", "wb") as file:
        file.truncate(tar_bytes)
    infos, digest = [], hashlib.sha256(index).hexdigest()
    for shard in range(SHARDS):
        name = shard_name(shard)
        os.symlink("index", folder / f"{name}.idx.npy")
        os.symlink("tar", folder / f"{name}.tar")
        infos.append(
            ShardInfo(
                name=name,
                tar=f"{name}.tar",
                text_format="json",
                num_samples=PER_SHARD,
                num_images=PER_SHARD,
                num_text_only=0,
                tar_bytes=tar_bytes,
                tar_sha256="",
                idx_bytes=len(index),
                idx_sha256=digest,
            )
        )
    lengths = LengthsInfo(
        file="lengths.npy",
        sha256="",
        tokenizer_sha256="made up",
        tokenizer_model="made up",
        conversation_template="v1",
    )
    # Holes read as zero tokens of text; with one image of 576 that is a sample of 576.
    np.lib.format.open_memmap(
        folder / lengths.file, mode="w+", dtype=np.int32, shape=(SHARDS * PER_SHARD, 2)
    )
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "num_samples": SHARDS * PER_SHARD,
        "num_images": SHARDS * PER_SHARD,
        "num_text_only": 0,
        "lengths": [asdict(lengths)],
        "shards": [asdict(info) for info in infos],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def resume(folder: Path, kind: str) -> dict[str, float]:
    """In this process: from a state at POSITION to a planned and located global batch."""
    started = time.perf_counter()
    from megatron_croc.costs.samples import SampleCost
    from megatron_croc.data.order.balance import deal
    from megatron_croc.data.order.batching import balanced, grouped, packed, separate
    from megatron_croc.data.order.blend import read_blend
    from megatron_croc.data.order.row_plan import OrderState, RowPlan, RowStream
    from megatron_croc.data.store.sample_lengths import look_up
    from megatron_croc.data.store.shards import ShardedDataset
    from megatron_croc.data.store.stored_array import open_array

    imported, cpu = time.perf_counter(), time.process_time()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = open_array(folder / "lengths.npy")

    def tokens_of(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return look_up(table, index)[:, 0] + 200 + index % 700, np.ones_like(index)

    cost = SampleCost(
        per_token=1.0,
        per_pair=4e-5,
        per_label=0.02,
        per_image=11.0,
        num_visual_tokens=576,
        has_spans=False,
    )
    arrangement = {
        "separate": separate,
        "grouped": lambda: grouped(tokens_of, global_batch_size=GLOBAL_BATCH_SIZE, seed=1),
        "packed": lambda: packed(
            tokens_of, packing_length=8192, packing_buffer_size=4096, measured="", seed=1
        ),
        "balanced": lambda: balanced(
            separate(),
            tokens_of,
            cost=cost,
            replicas=64,
            global_batch_size=GLOBAL_BATCH_SIZE,
            seed=1,
        ),
    }[kind]()
    plan = RowPlan(read_blend([str(folder)]), arrangement, seed=1)
    length = plan.blend.epoch_length
    windows = -(-length // arrangement.window_size)
    begin = POSITION * windows // length * length // windows  # where a window begins
    start = plan.start()
    state = OrderState(
        identity=start.identity,
        sources=start.sources,
        num_samples=start.num_samples,
        consumed=(begin,),
        window_start=(begin,),
    )
    stream = RowStream(plan, state)
    rows = stream.take(GLOBAL_BATCH_SIZE)
    dataset = ShardedDataset(plan.blend.folders)
    planned, planned_cpu = time.perf_counter(), time.process_time() - cpu
    for slot in (slot for row in rows[:8] for slot in row):
        dataset._locate(slot.index)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    taken = 0
    for _ in range(8):
        rows = stream.take(GLOBAL_BATCH_SIZE)
        taken += sum(len(row) for row in rows)
        if rows[0][0].cost is not None:
            deal(np.array([row[0].cost for row in rows]), 64)
    pace = (time.process_time() - begun) / taken
    return {
        "import_seconds": imported - started,
        "planned_seconds": planned - imported,
        "planned_cpu_seconds": planned_cpu,
        "located_seconds": done - planned,
        "peak_mib": peak / 1024,
        "peak_above_imports_mib": (peak - baseline) / 1024,
        "planning_cpu_us_per_sample": pace * 1e6,
    }


def main() -> None:
    """Make the folder if it is not there, then measure each arrangement in its own process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="made when missing")
    parser.add_argument("--kind", choices=KINDS, help="only this one")
    arguments = parser.parse_args()
    if not arguments.folder.exists():
        make_folder(arguments.folder)
    if arguments.kind:
        print(json.dumps(resume(arguments.folder, arguments.kind)))
        return
    for kind in KINDS:
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--kind", kind]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        print(kind)
        for name, value in json.loads(result.stdout.splitlines()[-1]).items():
            print(f"  {name:<27}{value:10.2f}")


if __name__ == "__main__":
    main()
