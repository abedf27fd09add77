import json
from pathlib import Path

from megatron_croc.training.reporting.metrics_log import drop_undone_steps


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def write(folder: Path, iterations: list[int], torn: str = "") -> list[str]:
    rows = [json.dumps({"iteration": i, "loss": i / 3}) for i in iterations]
    (folder / "metrics.jsonl").write_text("".join(row + "\n" for row in rows) + torn)
    return rows


def test_lines_of_lost_steps_move_out_of_the_curve(tmp_path: Path):
    rows = write(tmp_path, [10, 20, 20, 21, 40], torn='{"iteration": 50, "lo')
    assert drop_undone_steps(tmp_path, 20) == 3
    assert lines(tmp_path / "metrics.jsonl") == rows[:3]
    superseded = tmp_path / "metrics.superseded.jsonl"
    assert lines(superseded) == [*rows[3:], '{"iteration": 50, "lo']
    assert drop_undone_steps(tmp_path, 20) == 0
    assert drop_undone_steps(tmp_path, 0) == 3  # started anew
    assert lines(tmp_path / "metrics.jsonl") == []
    assert len(lines(superseded)) == 6


def test_a_clean_or_absent_curve_is_left_alone(tmp_path: Path):
    assert drop_undone_steps(tmp_path, 5) == 0
    assert list(tmp_path.iterdir()) == []
    rows = write(tmp_path, [1, 2])
    assert drop_undone_steps(tmp_path, 2) == 0
    assert lines(tmp_path / "metrics.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
