"""Cost of a stage-1.5 step beside the released Croc's and ViCToR's.

    OMP_NUM_THREADS=1 python benchmarks/step_beside_release.py \\
        --peer-croc FOLDER --python-croc PYTHON --peer-victor FOLDER --python-victor PYTHON \\
        [--sizes small large] [--vocabularies 8000 151936] [--repeats 7] [--out benchmarks/results]
    python benchmarks/step_beside_release.py --device cuda --dtype bf16 --sizes wide \\
        --vocabularies 32000 --peer-croc FOLDER --python-croc PYTHON

Each project runs in a process of its own; the two take their steps in turn, so that a busy machine
hits both. A step is forward, backward, clipping and AdamW in fp32, from the same weights, on the
same samples and the same replaced tokens. CPU time is the time of the process, on all its threads.
On a GPU, which both share, the time is wall time up to the end of its work; not run so far.
The released code pads samples to the longest and computes every logit; ours packs them.

The released code is no part of this project. Each of its projects needs an interpreter with
torch, scipy and pillow: Croc transformers 4.37.2, ViCToR transformers 4.53.1 and einops.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

from beside.case import DTYPES, SIZES, Peer, Size
from beside.processes import Pair, Worker, add_peer_options, chosen_peers, start_pair

NUM_BATCHES = 4
"""Different micro-batches."""

WARM_UP = 2
"""Steps before the measured ones; the first is without dropout, and its losses must agree."""

SAME_LOSS = {"fp32": 1e-4, "bf16": 0.02}
"""Relative bound of the first step's loss: other orders of sums, and rounding."""


def measure(pair: Pair, repeats: int, *, device: str, dtype: str) -> dict[str, Any]:
    """Steps in turn, the order of the two reversed every time; then one with its parts."""
    names: dict[str, Worker] = {"released": pair.released, "ours": pair.ours}
    first = {name: worker.ask({"step": 0, "dropout": False}) for name, worker in names.items()}
    error = abs(first["ours"]["loss"] / first["released"]["loss"] - 1.0)
    if not error < SAME_LOSS[dtype]:
        raise SystemExit(f"error: not the same work, the first losses are {first}")
    replies: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for step in range(1, WARM_UP + repeats):
        for name, worker in sorted(names.items(), reverse=bool(step % 2)):
            reply = worker.ask({"step": step, "dropout": True})
            if step >= WARM_UP:
                replies[name].append(reply)
    result: dict[str, Any] = {"first_loss_error": error}
    for name, worker in names.items():
        parts = {"operations": {}, "calls": {}, "gflop": None, "cpu": 0.0}
        if device == "cpu":
            parts = worker.ask({"step": WARM_UP + repeats, "dropout": True, "parts": True})
        result[name] = {
            "cpu": statistics.median(reply["cpu"] for reply in replies[name]),
            "cpu_all": [round(reply["cpu"], 4) for reply in replies[name]],
            "wall": statistics.median(reply["wall"] for reply in replies[name]),
            "peak_mib": replies[name][-1]["peak_mib"],
            "gflop": parts["gflop"],
            "operations": _parts(parts),
            "calls": parts["calls"],
            "versions": worker.versions,
        }
    pairs = zip(replies["ours"], replies["released"], strict=True)
    clock = result["clock"] = "cpu" if device == "cpu" else "wall"
    ratios = sorted(ours[clock] / released[clock] for ours, released in pairs)
    result["ratio"] = statistics.median(ratios)
    result["ratio_range"] = [ratios[0], ratios[-1]]
    return result


def _parts(reply: dict[str, Any]) -> dict[str, float]:
    """CPU seconds by kind of operation, and what is left: Python, autograd and the measuring."""
    inside = sum(reply["operations"].values())
    return {**reply["operations"], "between operations": reply["cpu"] - inside}


def print_result(peer: Peer, size: Size, result: dict[str, Any]) -> None:
    """Table of one comparison."""
    low, high = result["ratio_range"]
    print(f"\n{peer}, size {size.name}, {size.vocab_size} words:", end=" ")
    print(
        f"ours takes {result['ratio']:.2f} of its {result['clock']} time ({low:.2f} to {high:.2f})"
    )
    print(f"{'':<24} {'released':>10} {'ours':>10}")
    rows = {
        "CPU time (ms)": ("cpu", 1e3),
        "wall time (ms)": ("wall", 1e3),
        "GFLOP": ("gflop", 1.0),
        "peak memory (MiB)": ("peak_mib", 1.0),
    }
    for label, (key, factor) in rows.items():
        if result["ours"][key] is None:  # not counted on a GPU
            continue
        print(f"{label:<24}", *(f"{result[n][key] * factor:10.1f}" for n in ("released", "ours")))
    released, ours = (result[name]["operations"] for name in ("released", "ours"))
    for row in sorted({*released, *ours}, key=lambda row: -released.get(row, 0.0)):
        values = (f"{part.get(row, 0.0) * 1e3:10.1f}" for part in (released, ours))
        print(f"  {row:<22}", *values, flush=True)


def main() -> None:
    """Run the comparisons, print the tables, keep them when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_peer_options(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "large"])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[8000, 151936])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=7, help="measured steps of each project")
    parser.add_argument("--out", type=Path, help="folder for step_beside_release.json")
    options = parser.parse_args()
    peers = chosen_peers(parser, options)

    file = options.out / "step_beside_release.json" if options.out is not None else None
    hardware = f"cpu, {platform.machine()}" if options.device == "cpu" else options.device
    results: dict[str, Any] = {"hardware": hardware, "dtype": options.dtype, "comparisons": {}}
    where = {"device": options.device, "dtype": options.dtype}
    for peer, (folder, python) in peers.items():
        for name in options.sizes:
            for vocab_size in options.vocabularies:
                size = SIZES[name].with_vocabulary(vocab_size)
                with start_pair(
                    peer, size, folder, python, num_batches=NUM_BATCHES, learning_rate=1e-3, **where
                ) as pair:
                    result = measure(pair, options.repeats, **where)
                    results["hardware"] = pair.ours.versions.get("device", hardware)
                print_result(peer, size, result)
                results["comparisons"][f"{peer}/{name}/{vocab_size}"] = {
                    "size": size.to_json(),
                    **result,
                }
                if file is not None:  # after each, so that an interrupted run keeps the rest
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
