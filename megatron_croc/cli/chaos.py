"""Cause faults in training, and check that every promise about them is kept.

    croc chaos                     # all faults; exit status 1 when a promise is broken
    croc chaos --only hang --only sigterm
    croc chaos --list
    croc chaos soak --steps 2000     # memory, open files, threads over a long run

Everything runs on the CPU with two ranks (gloo) of a tiny model, on data drawn on the spot, in a
folder that is deleted at the end (--keep FOLDER: it stays). "Seconds to recover" go from the end of
the broken run to the end of the first step after it; but for torchrun-restart, Python's imports are
not in them.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_croc.config.parser import CommandParser
from megatron_croc.verification.faults.promises import BrokenPromiseError
from megatron_croc.verification.faults.scenarios import SCENARIOS
from megatron_croc.verification.faults.workplace import Outcome, Workplace

HEAD = ("fault", "promise", "result", "samples seen exactly once", "steps lost", "s to recover")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix or the soak."""
    parser = CommandParser(
        prog="croc chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("matrix", "soak"), default="matrix")
    parser.add_argument(
        "--only", action="append", choices=SCENARIOS, metavar="NAME", help="one fault; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="names of the faults, and exit")
    parser.add_argument("--steps", type=int, default=2000, help="of the soak")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there and leave it")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{name:22}{fault}" for name, (fault, _, _) in SCENARIOS.items()))
        return 0
    with _folder(options.keep) as root:
        if options.command == "soak":
            return soak(root, options.steps)
        return matrix(root, options.only or list(SCENARIOS))


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def matrix(root: Path, names: Sequence[str]) -> int:
    """Each fault in turn; prints the table as it grows."""
    place = Workplace(root=root)
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    broken: list[str] = []
    for name in names:
        fault, promise, scenario = SCENARIOS[name]
        started, result, outcome = time.monotonic(), "kept", Outcome()
        try:
            outcome = scenario(place, root / name)
        except (BrokenPromiseError, TimeoutError, OSError, StopIteration) as error:
            result = f"BROKEN: {' '.join(str(error).split())}"
            broken.append(name)
        took = f"{time.monotonic() - started:.0f} s"
        cells = (
            f"{name}: {fault}",
            promise,
            f"{result} ({took})",
            {None: "", True: "yes", False: "NO"}[outcome.samples_once],
            "" if outcome.steps_lost is None else str(outcome.steps_lost),
            "" if outcome.seconds is None else f"{outcome.seconds:.1f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"{len(names) - len(broken)} of {len(names)} promises kept")
    return 1 if broken else 0


def soak(root: Path, steps: int) -> int:
    """A long run in this process."""
    from megatron_croc.verification.faults.runs import STAGE, make_data, train_words
    from megatron_croc.verification.faults.soak import RSS_GROWTH, growth
    from megatron_croc.verification.faults.soak import soak as run_soak

    data = make_data(root / "data")
    words = train_words(data, root / "soak", f"--valid-data-path={data / f'valid_{STAGE}'}")
    usages = run_soak(words, steps=steps)
    print("| step | memory MiB | open files | threads | shared memory MiB |\n|" + "---|" * 5)
    for usage in usages:
        cells = (usage.iteration, f"{usage.rss:.1f}", usage.files, usage.threads, usage.shared)
        print("| " + " | ".join(map(str, cells)) + " |")
    grown = growth(usages)
    print("second half: " + ", ".join(f"{name} {value:+.1f}" for name, value in grown.items()))
    is_bounded = grown["rss"] < RSS_GROWTH and not any(
        grown[name] > 0 for name in ("files", "threads", "shared")
    )
    return 0 if is_bounded else 1
