"""Watch a run: croc monitor RUN_DIR [RUN_DIR ...]

RUN_DIR is the --log-dir (or --save) folder of a run, or a folder of such folders. Several runs are
shown under each other and compared. It only reads, needs no GPU, and may be started anywhere the
folder can be seen.

    --once           print one frame and exit (also when the output is no terminal)
    --html FILE      write a page with all curves instead
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.cli.errors import reports_errors
from megatron_croc.config.parser import CommandParser
from megatron_croc.monitoring.live.page import write_page
from megatron_croc.monitoring.live.reading import find_runs, read_run
from megatron_croc.monitoring.live.terminal import Style, draw_frame

_CLEAR = "\x1b[H\x1b[J"


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Show frames until Ctrl-C; return the exit status."""
    options = _parser().parse_args(argv)
    once = options.once or not sys.stdout.isatty()
    try:
        while True:
            runs = [read_run(folder) for folder in find_runs(options.run_dir)]
            if options.html is not None:
                write_page(options.html, runs)
                print(f"page: {options.html}")
                return 0
            frame = draw_frame(runs, _style())
            sys.stdout.write(frame if once else _CLEAR + frame)
            sys.stdout.flush()
            if once:
                return 0
            time.sleep(options.interval)
    except OSError as error:
        print(f"error: {error.filename or options.html}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="croc monitor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--once", action="store_true", help="print one frame")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="between frames (2)"
    )
    return parser


def _style() -> Style:
    """Style for this output; respects NO_COLOR and a dumb terminal."""
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return Style(
        width=min(140, shutil.get_terminal_size((100, 40)).columns),
        colour=is_terminal and "NO_COLOR" not in os.environ,
        unicode=encoding == "utf8",
    )
