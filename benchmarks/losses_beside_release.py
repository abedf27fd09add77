"""Loss curves of the released Croc and ViCToR and of ours, laid over each other.

    OMP_NUM_THREADS=1 python benchmarks/losses_beside_release.py \\
        --peer-croc FOLDER --python-croc PYTHON --peer-victor FOLDER --python-victor PYTHON \\
        [--steps 100] [--out benchmarks/results/beside]

The same initial weights, micro-batches, replaced tokens and AdamW; no dropout; fp32. The control is
the released code once more, with embeddings that differ in the last bit: two correct programs that
round differently may differ as much. Croc's release takes the nearest pool token and the prefix
mask, ViCToR's matches one to one and is causal, and ours is set likewise. The released code is no
part of this project, see step_beside_release.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from beside.case import SIZES, Peer
from beside.processes import Pair, add_peer_options, chosen_peers, start_pair

LOSSES = {"loss": "whole loss", "text_loss": "text", "reconstruction_loss": "reconstruction"}
NAMES = {"croc": "Croc (nearest, prefix mask)", "victor": "ViCToR (one to one, causal)"}


def train(pair: Pair, steps: int) -> dict[str, Any]:
    """Losses of every step in all processes, and the largest relative difference of each loss."""
    assert pair.control is not None
    curves: dict[str, dict[str, list[float]]] = {}
    for project, worker in pair._asdict().items():
        replies = [worker.ask({"step": step, "dropout": False}) for step in range(steps)]
        curves[project] = {loss: [reply[loss] for reply in replies] for loss in LOSSES}
    return {
        "versions": {"released": pair.released.versions, "ours": pair.ours.versions},
        "largest_difference": {
            project: {loss: _largest(_differences(curves, project, loss)) for loss in LOSSES}
            for project in ("ours", "control")
        },
        "curves": curves,
    }


def _differences(curves: dict[str, dict[str, list[float]]], project: str, loss: str) -> list[float]:
    """Relative difference from the released code's loss at every step."""
    pairs = zip(curves["released"][loss], curves[project][loss], strict=True)
    return [abs(found / released - 1.0) for released, found in pairs]


def _largest(differences: list[float]) -> dict[str, float]:
    return {"relative": max(differences), "step": differences.index(max(differences))}


def draw(peer: Peer, result: dict[str, Any], path: Path) -> None:
    """Curves of both projects on the left, their relative difference on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    curves = result["curves"]
    for number, (loss, label) in enumerate(LOSSES.items()):
        color = f"C{number}"
        left.plot(curves["released"][loss], color=color, lw=5, alpha=0.35)
        left.plot(curves["ours"][loss], color=color, lw=1, label=label)
        # An exact zero has no place on a logarithmic axis.
        for project, style in {"ours": "-", "control": ":"}.items():
            differences = [max(d, 1e-9) for d in _differences(curves, project, loss)]
            right.plot(differences, style, color=color, lw=1, label=f"{label}, {project}")
    left.set_title(f"{NAMES[peer]}: wide released, thin ours", fontsize=10)
    right.set_title("relative difference from the released code", fontsize=10)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def print_result(peer: Peer, result: dict[str, Any]) -> None:
    """First and last losses, and the largest difference."""
    curves = result["curves"]
    print(f"{NAMES[peer]}, {len(curves['ours']['loss'])} steps")
    columns = ("first", "last: released", "ours", "control", "largest: ours", "control")
    print(f"{'':<16}", *(f"{column:>14}" for column in columns))
    for loss, label in LOSSES.items():
        last = [curves[project][loss][-1] for project in ("released", "ours", "control")]
        largest = (result["largest_difference"][p][loss] for p in ("ours", "control"))
        print(
            f"{label:<16} {curves['released'][loss][0]:14.5f}",
            *(f"{value:14.5f}" for value in last),
            *(f"{worst['relative']:14.1e}" for worst in largest),
            flush=True,
        )


def main() -> None:
    """Train both, print the differences, keep curves and picture when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_peer_options(parser)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of all parts")
    parser.add_argument("--num-batches", type=int, default=8, help="different micro-batches")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for losses_PEER.json and .png",
    )
    options = parser.parse_args()
    size = SIZES[options.size]

    for peer, (folder, python) in chosen_peers(parser, options).items():
        with start_pair(
            peer,
            size,
            folder,
            python,
            num_batches=options.num_batches,
            learning_rate=options.learning_rate,
            with_control=True,
        ) as pair:
            result = train(pair, options.steps)
        print_result(peer, result)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            record = {"size": size.to_json(), "learning_rate": options.learning_rate, **result}
            (options.out / f"losses_{peer}.json").write_text(json.dumps(record) + "\n")
            draw(peer, result, options.out / f"losses_{peer}.png")


if __name__ == "__main__":
    main()
