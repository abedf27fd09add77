"""Folders made by hand, read, drawn in text and as a page."""

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_croc.cli.monitor import main
from megatron_croc.errors import DataError
from megatron_croc.monitoring.live.reading import find_runs, read_run
from megatron_croc.monitoring.live.terminal import Style, draw_frame, duration, sparkline

PLAIN = Style(width=100, colour=False, unicode=False)


def train_row(iteration: int, **more: float) -> dict:
    return {
        "iteration": iteration,
        "loss": 9.0 / iteration,
        "text_loss": 8.0 / iteration,
        "reconstruction_loss": 1.0 / iteration,
        "grad_norm": 2.0,
        "seconds_per_step": 2.0,
        "tokens_per_second": 1000.0 * iteration,
        "world_size": 4,
        "train_iters": 100,
        "interval_seconds": 30.0,
        "time_share/forward": 0.5,
        "time_share/backward": 0.25,
        "time_share/data_wait": 0.25,
        "pool_usage": 0.5,
        "lr/projector": 1e-3,
        "lr/prompt_pool": 1e-3,
        **more,
    }


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 4 ranks that stands at step 40 of 100, with one thing of each kind."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [train_row(10), train_row(20), {"iteration": 20, "valid_loss": 0.5}]
    rows += [train_row(30, skipped_steps=2), train_row(40)]
    rows[2]["valid_text_loss"] = 0.375
    write_lines(folder / "metrics.jsonl", rows)
    for name in ("iter_0000010", "iter_0000020", "iter_0000030.incomplete"):
        (folder / name).mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("20\n")
    slow = {"rank": 3, "host": "node1", "cause": "compute", "percent": 42.0}
    line = {"iteration": 40, "step_seconds": [2.0] * 4, "compute_seconds": [1, 1, 1, 1.42]}
    write_lines(folder / "stragglers.jsonl", [{**line, "slow": [slow]}])
    beats = folder / "heartbeats"
    beats.mkdir()
    for rank, since in ((0, 5.0), (1, 500.0)):
        beat = {"rank": rank, "host": "node0", "iteration": 41 - rank, "phase": "forward"}
        beat["collective"] = "broadcast" if rank else None
        text = json.dumps({**beat, "since": time.time() - since, "pid": 1})
        (beats / f"rank_{rank:05d}.json").write_text(text)
    (beats / "rank_00002.json").write_text('{"rank": 2, "ho')  # torn
    return folder


def test_a_folder_is_read_as_it_stands(folder: Path):
    run = read_run(folder)
    assert (run.iteration, run.train_iters, run.is_done) == (40, 100, False)
    assert run.seconds_per_step == 3.0  # 30 s for 10 steps: pauses are part of the way
    assert run.seconds_left == 3.0 * 60
    assert run.skipped_steps == 2 and run.checkpoints == [10, 20]
    assert run.checkpoint is not None and run.checkpoint.iteration == 20
    assert run.series("valid_text_loss") == [(20, 0.375)]
    assert run.time_shares() == {"forward": 0.5, "backward": 0.25, "data_wait": 0.25}
    assert [beat.rank for beat in run.beats] == [0, 1]
    assert [beat.rank for beat in run.stale_ranks] == [1]


def test_the_pace_is_the_mean_of_the_last_five_intervals(tmp_path: Path):
    # 10 steps a row; the seconds of the rows: 100, 100, 100, then 10, 20, 30, 40, 60.
    seconds = [100.0, 100.0, 100.0, 10.0, 20.0, 30.0, 40.0, 60.0]
    rows = [train_row(10 * n, interval_seconds=s) for n, s in enumerate(seconds, start=1)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    run = read_run(tmp_path)
    assert run.seconds_per_step == pytest.approx((10 + 20 + 30 + 40 + 60) / 5 / 10)
    assert run.seconds_left == pytest.approx(3.2 * (100 - 80))
    assert run.recent("tokens_per_second") == 60_000.0  # median of 40, 50, 60, 70, 80 thousand


def test_a_line_being_written_is_left_out_and_a_redone_step_counts_once(folder: Path):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_row(30, text_loss=7.0)) + "\n" + '{"iteration": 50, "lo')
    run = read_run(folder)
    assert [row["iteration"] for row in run.train] == [10, 20, 30, 40]
    assert run.train[2]["text_loss"] == 7.0


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}'])
def test_another_bad_line_is_named(folder: Path, line: str, capsys):
    path = folder / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(DataError, match=re.escape(f"{path}, line 1: ")):
        read_run(folder)
    assert main([str(folder), "--once"]) == 1
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(f"error: {path}, line 1: ")


def test_an_empty_folder_is_one_line(tmp_path: Path, capsys):
    assert main([str(tmp_path)]) == 1
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(f"error: {tmp_path}: no metrics.jsonl")


def test_a_folder_of_stages_is_its_stages_in_the_order_they_ran(folder: Path, tmp_path: Path):
    for name, when in (("later", 2e9), ("earlier", 1e9)):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "metrics.jsonl", [train_row(1)])
        os.utime(tmp_path / name / "metrics.jsonl", (when, when))
    os.utime(folder / "metrics.jsonl", (1.5e9, 1.5e9))
    assert [path.name for path in find_runs([tmp_path])] == ["earlier", "run", "later"]


def test_a_frame_says_what_is_going_on(folder: Path):
    frame = draw_frame([read_run(folder)], PLAIN)
    assert frame.isascii() and "\x1b" not in frame
    assert all(len(line) <= 100 for line in frame.splitlines()), frame
    for fragment in (
        "run, 4 ranks  running",
        "step 40/100 [#]{20}-{30} 40%  3 min 00 s left",
        "text loss +0.2  ",
        "held-out text +0.375  ",
        "2 s/step | 25,000 tokens/s",
        "D{24}F{48}B{24}",
        "D data_wait 25% F forward 50% B backward 25%",
        "pool used 50%",
        "checkpoint of step 20, ",
        "2 steps skipped",
        r"rank 3 on node1 computes 42 % longer",
        "2 ranks at steps 40 to 41",
        r"rank 1 on node0: 8 min 2. s in forward \(broadcast\)",
    ):
        assert re.search(fragment, frame), (fragment, frame)


def test_a_narrow_terminal_keeps_every_region(folder: Path):
    from megatron_croc.monitoring.live.terminal import REGION_LETTERS

    row = {k: v for k, v in train_row(40).items() if not k.startswith("time_share/")}
    row |= {f"time_share/{name}": 1 / 12 for name in REGION_LETTERS}
    write_lines(folder / "metrics.jsonl", [row])
    frame = draw_frame([read_run(folder)], Style(width=64, colour=False, unicode=False))
    (bar,) = (k for k, line in enumerate(frame.splitlines()) if "DDDDDVVVVV" in line)
    drawn, *legend = frame.splitlines()[bar : bar + 6]
    assert drawn.strip() == "".join(letter * 5 for letter, _ in REGION_LETTERS.values())
    legend = legend[: 1 + next(k for k, line in enumerate(legend) if "other" in line)]
    assert all(len(line) <= 64 for line in legend), legend
    words = "".join(legend)
    assert all(f"{name} 8%" in words for name in REGION_LETTERS)


def test_several_runs_are_compared(folder: Path, tmp_path: Path):
    done = tmp_path / "done"
    done.mkdir()
    write_lines(done / "metrics.jsonl", [train_row(100)])
    frame = draw_frame([read_run(folder), read_run(done)], PLAIN)
    *_, head, first, second = frame.splitlines()
    assert head.split()[:2] == ["run", "step"]
    assert first.split()[:3] == ["run", "40", "0.2"] and first.endswith("3 min 00 s")
    assert second.split()[:3] == ["done", "100", "0.08"] and second.endswith("done")


def test_a_silent_run_is_an_alarm(folder: Path):
    before = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (before, before))
    frame = draw_frame([read_run(folder)], Style(width=100))
    assert "\x1b[1;31msilent for 1 h 00 min\x1b[0m" in frame


def test_a_sparkline_keeps_the_shape():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8, "01234567") == "01234567"
    assert sparkline([0, 0, 10, 10], 2, "01234567") == "07"  # means of two
    assert sparkline([5.0, 5.0], 8, "01234567") == "00"
    assert sparkline([], 8) == ""


def test_durations_are_short():
    durations = {None: "?", 7.4: "7 s", 250: "4 min 10 s", 11100: "3 h 05 min", 9e4: "1 d 1 h"}
    assert {seconds: duration(seconds) for seconds in durations} == durations


class Page(HTMLParser):
    """Checks that tags close, and collects what is shown."""

    VOID = ("meta", "circle", "line", "rect", "polyline", "polygon")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID or not self.get_starttag_text().endswith("/>"):
            self.open += [tag] if tag != "meta" else []

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_everything_and_loads_nothing(folder: Path, tmp_path: Path, capsys):
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("pictures")
    path = tmp_path / "pages" / "run.html"
    assert main([str(folder), "--html", str(path)]) == 0
    assert capsys.readouterr().out == f"page: {path}\n"
    text = path.read_text(encoding="ascii")
    page = Page(text)
    links = [a["href"] for tag, a in page.seen if tag == "a"]
    assert links == ["../run/report/report.html"]
    assert not re.search(r"(src|href)=.(https?:|//)|@import|url\(|<script|<link", text)
    words = " ".join(page.words)
    for title in ("Text loss", "Reconstruction loss", "Throughput", "Gradient norm"):
        assert title in words
    for fact in (
        "40 / 100",
        "held-out 0.375",
        "projector, prompt_pool",  # equal rates are one line
        "forward: 50.0% on average",
        "rank 3 on node1 computes 42 % longer",
        "2 of the steps up to here changed nothing",
        "standing still",
        "rank 3: 1.42 s",
    ):
        assert fact in words, fact


def test_lines_are_where_their_numbers_are(folder: Path):
    from megatron_croc.monitoring.live.charts import (
        BOTTOM,
        HEIGHT,
        LEFT,
        RIGHT,
        TOP,
        WIDTH,
        Series,
        line_chart,
    )

    picture = line_chart([Series(name="x", points=[(0, 0.0), (5, 10.0), (10, 5.0)])])
    (path,) = re.findall(r'<polyline class="line c0" points="([^"]+)"', picture)
    places = [tuple(map(float, place.split(","))) for place in path.split()]
    middle = (LEFT + WIDTH - RIGHT) / 2
    assert places == [
        (LEFT, HEIGHT - BOTTOM),
        (middle, TOP),
        (WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2),
    ]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.0, 6.3, [0.0, 2.0, 4.0, 6.0, 8.0]),
        (1e-5, 4e-5, [1e-5, 2e-5, 3e-5, 4e-5]),
        (3.0, 3.0, [3.0, 3.1, 3.2, 3.3]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, ticks: list[float]):
    from megatron_croc.monitoring.live.charts import nice_ticks

    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_a_long_run_keeps_its_peaks():
    from megatron_croc.monitoring.live.charts import thin

    points = [(float(k), 1.0) for k in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 400 and (54_321.0, 99.0) in kept
    assert kept == sorted(kept)


def test_a_pipe_gets_one_plain_frame_and_torch_is_not_imported(folder: Path):
    code = (
        "import sys; from megatron_croc.cli.monitor import main; "
        f"status = main([{str(folder)!r}]); "
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert "\x1b" not in done.stdout and done.stdout.splitlines()[-1] == "0 False"
    assert "step 40/100" in done.stdout
