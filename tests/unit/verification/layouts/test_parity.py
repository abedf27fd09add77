"""Reading layouts and logs; the comparison itself is tested in tests/distributed."""

import json
from pathlib import Path

import pytest

from megatron_croc.cli.main import main
from megatron_croc.errors import ConfigError
from megatron_croc.verification.layouts.layout import Layout, every_layout
from megatron_croc.verification.layouts.logs import compare_logs


def write_log(folder: Path, losses: dict[int, float]) -> Path:
    folder.mkdir()
    rows = [{"iteration": i, "text_loss": x, "grad_norm": 1.0} for i, x in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_layouts_are_read():
    layout = Layout.parse("tp2+sp+pp2+vpp3+dp4")
    assert layout.sizes == {"tp": 2, "pp": 2, "vpp": 3, "dp": 4}
    assert layout.sequence_parallel
    assert layout.world_size == 16  # chunks of one rank need no processes
    for wrong in ("tp", "2tp", "xp2", "tp2,pp2", ""):
        with pytest.raises(ConfigError, match="layout"):
            Layout.parse(wrong)


def test_every_layout_is_different_and_fits():
    layouts = every_layout(4)
    assert len({layout.name for layout in layouts}) == len(layouts)
    assert all(2 <= layout.world_size <= 4 for layout in layouts)
    assert {"tp2+sp+pp2+vpp2", "cp2+dp2", "tp2+cp2"} <= {layout.name for layout in layouts}
    assert not any("sp" in x.name.split("+") and "tp2" not in x.name for x in layouts)


def test_logs(tmp_path: Path, capsys):
    a = write_log(tmp_path / "a", {1: 2.0, 2: 1.0, 3: 0.5})
    b = write_log(tmp_path / "b", {2: 1.0, 3: 0.5001})
    assert compare_logs(a, b, bound=1e-3) == 0
    assert compare_logs(a, b, bound=1e-4) == 1
    assert "above 1e-04 from iteration 3" in capsys.readouterr().out


def test_a_step_done_again_counts_as_its_last(tmp_path: Path):
    a = write_log(tmp_path / "a", {1: 2.0})
    b = write_log(tmp_path / "b", {1: 9.0})
    with (b / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"iteration": 1, "text_loss": 2.0, "grad_norm": 1.0}) + "\n")
    assert compare_logs(a, b, bound=0.0) == 0


def test_wrong_logs_are_one_line(tmp_path: Path, capsys):
    a = write_log(tmp_path / "a", {1: 2.0})
    (tmp_path / "b").mkdir()
    assert main(["parity", "runs", str(a), str(tmp_path / "b")]) == 1
    (tmp_path / "b" / "metrics.jsonl").write_text('{"iteration": 1}\nnonsense\n')
    assert main(["parity", "runs", str(a), str(tmp_path / "b")]) == 1
    errors = capsys.readouterr().err
    assert "metrics.jsonl: no such log" in errors
    assert "metrics.jsonl, line 2: not a row of metrics" in errors


def test_an_impossible_layout_is_named_before_anything_starts(capsys):
    words = ["parity", "layouts", "--recipe", "tiny/pretrain_croc", "--layouts", "tp2 tp3 pp2"]
    assert main(words) == 1
    assert "layout tp3: " in capsys.readouterr().err
