"""Check and measure on this machine what the project claims, within a time box.

    croc prove --minutes 25 --out runs/prove            # on a GPU, from a checkout
    croc prove --cards benchmarks/cards          # and write the cards
    croc prove --cards-only --cards benchmarks/cards    # from results that came back
    croc prove --small                                  # the same list at sizes for a CPU
    croc prove --list
    croc prove --only attention --only step_croc_7b
    croc prove --peer-croc FOLDER --python-croc PYTHON  # also the released code's step beside ours

Stages run in order of worth, each in processes of its own with a part of the time. One that fails,
crashes or hangs is reported, and the next one begins. Each result is written when it is there; the
same command goes on where an earlier one ended (--again: from the beginning). Exit status 1 when a
stage failed.
"""

import argparse
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the list, print a line for each stage, and write the cards when asked."""
    from megatron_croc.verification.prove.stages import STAGES

    names = [stage.name for stage in STAGES]
    options = _parser(names).parse_args(argv)
    if options.list:
        for stage in STAGES:
            print(f"{stage.name:<16} {stage.minutes:4.1f} min  {stage.shows}")
        return 0
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        raise ConfigError(f"--minutes {options.minutes}: a number of minutes above 0 is needed")
    if options.cards is not None and options.small:
        raise ConfigError("--cards with --small: cards quote a GPU, leave one of the two out")
    cards: Path | None = options.cards
    if options.cards_only:
        if cards is None:
            raise ConfigError("--cards-only: name their folder with --cards")
        return _write_cards(options.out, cards)
    checkout = _find_checkout(options.checkout)
    peer = _peer(options)

    from megatron_croc.verification.prove.machine import look
    from megatron_croc.verification.prove.runner import Job, run_stages
    from megatron_croc.verification.prove.stage import Place

    machine = look()
    print(f"{machine.title}; Python {machine.python}, torch {machine.versions.get('torch')}")
    if not machine.num_gpus and not options.small:
        raise ConfigError("no GPU is in sight; --small runs the list at sizes for a CPU")
    out = options.out.resolve()
    shared = out / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    place = Place(
        folder=out,
        shared=shared,
        checkout=checkout,
        machine=machine,
        is_small=options.small,
        peer=peer,
    )
    job = Job(
        out=out,
        place=place,
        minutes=options.minutes,
        commit=_commit(checkout),
        tell=lambda line: print(line, flush=True),
    )
    stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
    results = run_stages(stages, job, again=options.again)
    if cards is not None:
        _write_cards(out, cards)
    failed = [result.stage for result in results if result.status in ("failed", "timed out")]
    passed = sum(result.status == "passed" for result in results)
    print(f"{passed} of {len(results)} passed" + (f"; not: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    from megatron_croc.verification.prove.runner import LIST_MINUTES

    parser = CommandParser(
        prog="croc prove", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=LIST_MINUTES, help="of the whole list")
    parser.add_argument("--out", type=Path, default=Path("runs/prove"), help="for results and logs")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help="one stage; repeatable"
    )
    parser.add_argument("--again", action="store_true", help="run also what has passed here")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU: a dry run")
    parser.add_argument("--cards", type=Path, metavar="DIR", help="write the cards of the recipes")
    parser.add_argument(
        "--cards-only", action="store_true", help="from the results in --out; nothing is run"
    )
    parser.add_argument("--checkout", type=Path, default=Path(), help="the repository (default: .)")
    parser.add_argument(
        "--peer-croc", type=Path, metavar="DIR", help="checkout of the released Croc"
    )
    parser.add_argument(
        "--python-croc", metavar="FILE", help="interpreter that can import it (transformers 4.37.2)"
    )
    parser.add_argument("--list", action="store_true", help="the stages, and exit")
    return parser


def _peer(options: argparse.Namespace) -> tuple[Path, str] | None:
    """The released code, refused before anything runs if it is not there."""
    folder: Path | None = options.peer_croc
    if folder is None:
        if options.python_croc is not None:
            raise ConfigError("--python-croc without --peer-croc: name the released code as well")
        return None
    if not (folder / "croc" / "model").is_dir():
        raise ConfigError(f"--peer-croc {folder}: no folder croc/model in it")
    python = options.python_croc or sys.executable
    if shutil.which(python) is None:
        raise ConfigError(f"--python-croc {python}: there is no such program")
    return folder.resolve(), python


def _write_cards(results: Path, folder: Path) -> int:
    """Write the cards from results in a folder, whichever machine they are of."""
    from megatron_croc.verification.prove.card import write_cards
    from megatron_croc.verification.prove.result import read_result
    from megatron_croc.verification.prove.stages import REAL_RECIPES, STAGES

    found = [read_result(results / f"{stage.name}.json") for stage in STAGES]
    measured = [result for result in found if result is not None and not result.is_small]
    for file in write_cards(folder, ("tiny", *REAL_RECIPES), STAGES, measured):
        print(f"wrote {file}")
    return 0


def _find_checkout(folder: Path) -> Path:
    """The repository: benchmarks and tests do not come with the package."""
    if not (folder / "benchmarks" / "attention.py").is_file():
        raise ConfigError(
            f"--checkout {folder}: no benchmarks/ there; run croc prove in a checkout of the "
            "repository, or name one"
        )
    return folder.resolve()


def _commit(checkout: Path) -> str:
    """Short commit of the checkout, `+` behind it with changes; empty without git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
