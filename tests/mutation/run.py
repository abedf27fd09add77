"""Plant one-line faults in a copy of the tree, and list those that no test sees.

    make mutations ARGS="--sample 60"
    .venv/bin/python tests/mutation/run.py megatron_croc/data/order --sample 20 --seed 3

Every fault is tried in a process forked from this one, which has torch and megatron-core loaded and
nothing of this project; a run of a few quick tests so takes as long as the tests.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

# Run as a script: `tests` itself must be imported from the copy, in the forked processes.
from mutants import Mutant, find_mutants
from rooms import LEFT_OUT, TESTS, tests_of

ROOT = Path(__file__).resolve().parents[2]

DEFAULT = (
    "megatron_croc/ops", "megatron_croc/model", "megatron_croc/training/step.py",
    "megatron_croc/training/optimizer.py", "megatron_croc/data/order", "megatron_croc/checkpoint",
    "megatron_croc/planning",
)  # fmt: skip
PRELOADED = (
    "pytest", "numpy", "yaml", "scipy.stats", "hypothesis", "torch", "torch._dynamo",
    "torch.distributed.checkpoint", "safetensors.torch", "transformers",
    "megatron.core.optimizer", "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_layer_specs", "megatron.core.pipeline_parallel.schedules",
)  # fmt: skip

CAUGHT, TIMED_OUT, SURVIVED = "caught", "timed out", "survived"


def main() -> int:
    """Parse, sample, try; the exit status is 0 whatever survives."""
    args = _arguments()
    mutants = sample(args.paths, number=args.sample, seed=args.seed)
    if args.list:
        print("\n".join(map(str, mutants)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for name in PRELOADED:
        importlib.import_module(name)
    if known := [name for name in sys.modules if name.partition(".")[0] == "megatron_croc"]:
        raise SystemExit(f"{known[0]} is loaded already: forked tests would not see the fault")
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = copy_tree(Path(folder) / "tree")
        limits = {}
        for mutant in mutants:
            tests = tuple(tests_of(mutant.path))
            if tests not in limits:
                limits[tests] = args.limit or 2 * baseline(copy, tests) + 30
        results = []
        for number, mutant in enumerate(mutants, start=1):
            started = time.monotonic()
            tests = tuple(tests_of(mutant.path))
            outcome = try_out(copy, mutant, tests, limits[tests])
            results.append((mutant, outcome))
            seconds = time.monotonic() - started
            print(f"{number}/{len(mutants)} {outcome:9} {seconds:5.0f} s  {mutant}", flush=True)
            write(args.output, results, seed=args.seed)
    report(results)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=DEFAULT, help="files or folders to mutate")
    parser.add_argument("--sample", type=int, default=60, help="number of faults (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample (default 1)")
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds for each fault, where the tests are known to pass without one "
        "(default: run them first, and give twice that time)",
    )
    parser.add_argument("--list", action="store_true", help="print the sample, try nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutations.json")
    return parser.parse_args()


def sample(paths: list[str], *, number: int, seed: int) -> list[Mutant]:
    """`number` mutants of the files under `paths`, in the order of their files."""
    found = []
    for path in paths:
        full = ROOT / path
        for file in sorted(full.rglob("*.py")) if full.is_dir() else [full]:
            name = file.relative_to(ROOT).as_posix()
            if name not in LEFT_OUT and tests_of(name):
                found += find_mutants(name, file.read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"nothing to mutate in {' '.join(paths)}; rooms.py has {', '.join(TESTS)}")
    return sorted(random.Random(seed).sample(found, min(number, len(found))))


def copy_tree(target: Path) -> Path:
    """Copy the files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def baseline(copy: Path, tests: tuple[str, ...]) -> float:
    """Seconds that the tests take without a fault; they must pass."""
    started = time.monotonic()
    if run_tests(copy, tests, limit=3600) != CAUGHT:
        seconds = time.monotonic() - started
        print(f"without a fault {seconds:.0f} s: {' '.join(tests)}", flush=True)
        return seconds
    raise SystemExit(f"fails without a fault: {' '.join(tests)}\n{log_of(copy)[-3000:]}")


def try_out(copy: Path, mutant: Mutant, tests: tuple[str, ...], limit: float) -> str:
    """Plant a fault, run the tests, take it out."""
    file = copy / mutant.path
    original = file.read_text(encoding="utf-8")
    file.write_text(mutant.source(original), encoding="utf-8")
    try:
        return run_tests(copy, tests, limit=limit)
    finally:
        file.write_text(original, encoding="utf-8")


def run_tests(copy: Path, tests: tuple[str, ...], *, limit: float) -> str:
    """Run pytest in a forked process; it stops at the first failure."""
    child = os.fork()
    if child == 0:
        os.setsid()
        _in_child(copy, [test for test in tests if (copy / test).exists()])
    deadline = time.monotonic() + limit
    try:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return TIMED_OUT
            time.sleep(0.05)
    except BaseException:  # this process is stopped: so are the tests
        os.killpg(child, signal.SIGKILL)
        raise
    status = (copy / "status").read_text() if (copy / "status").exists() else "crashed"
    if status in ("3", "4", "5"):  # pytest's own errors, and nothing collected
        raise SystemExit(f"pytest could not run {' '.join(tests)}:\n{log_of(copy)[-3000:]}")
    return SURVIVED if status == "0" else CAUGHT


def _in_child(copy: Path, tests: list[str]) -> None:
    (copy / "status").unlink(missing_ok=True)
    log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(copy)
    # Two writes within a second can leave stale bytecode.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.path[0] = str(copy)
    # Processes that tests start would run this file again as their main module.
    sys.modules["__main__"] = types.ModuleType("__main__")
    import pytest

    code = pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests])
    (copy / "status").write_text(str(int(code)))
    sys.stdout.flush()
    os._exit(0)


def log_of(copy: Path) -> str:
    """Output of the last run of the tests."""
    return (copy / "log").read_text(errors="replace")


def write(path: Path, results: list[tuple[Mutant, str]], *, seed: int) -> None:
    """Write the outcomes so far as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"path": m.path, "line": m.line, "old": m.old, "new": m.new, "outcome": outcome}
        for m, outcome in results
    ]
    path.write_text(json.dumps({"seed": seed, "mutants": rows}, indent=1) + "\n")


def report(results: list[tuple[Mutant, str]]) -> None:
    """Print the score, every survivor, and what ran out of time (counted as caught)."""
    counts = Counter(outcome for _, outcome in results)
    seen = counts[CAUGHT] + counts[TIMED_OUT]
    print(f"\n{seen} of {len(results)} caught ({seen / len(results):.0%}); to look at:")
    for mutant, outcome in results:
        if outcome != CAUGHT:
            print(f"  {outcome:9} {mutant}")


if __name__ == "__main__":
    sys.exit(main())
