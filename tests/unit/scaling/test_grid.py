import json
import re
from pathlib import Path

import pytest

from megatron_croc.cli.scaling import main
from megatron_croc.errors import ConfigError
from megatron_croc.scaling.collect import collect
from megatron_croc.scaling.grid import read_grid
from megatron_croc.scaling.launch import final_validation, folder_of, prepare, write_slurm
from megatron_croc.scaling.report import fit_groups, write_json, write_report

GRID = """
recipe: tiny/pretrain_croc
settings: {training: {global_batch_size: 16}, data: {valid_data_path: [nowhere]}}
sizes:
  a: {model: {language_model: {hidden_size: 64}}}
  b: {model: {language_model: {hidden_size: 128}}}
  c: {model: {language_model: {hidden_size: 256}}}
samples: [100, 320, 1000]
axes: {pool_size: [128, 256]}
"""


@pytest.fixture
def grid(tmp_path: Path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return read_grid(path, tmp_path / "out")


def finish(grid, loss=lambda e: 1 + 50 / e.num_parameters**0.4 + 9 / e.num_samples**0.5):
    prepare(grid)
    for entry in grid.runs:
        row = {"iteration": entry.run.training.train_iters, "valid_loss": loss(entry)}
        (folder_of(entry) / "metrics.jsonl").write_text(json.dumps(row) + "\n{torn")


def test_runs_are_resolved(grid):
    assert len(grid.runs) == 18
    first = grid.runs[0]
    assert first.name == "a_100_pool_size-128"
    assert first.num_samples == 96 and first.run.training.train_iters == 6
    assert first.run.model.prompt_pool.pool_size == 128
    sizes = {run.size: run.num_parameters for run in grid.runs}
    assert sizes["a"] < sizes["b"] < sizes["c"]


def test_every_fault_is_told_before_anything_starts(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.replace("pool_size: [128, 256]", "pool_size: [128, 9], pool_sise: [1]"))
    with pytest.raises(ConfigError, match="unknown setting pool_sise"):
        read_grid(path, tmp_path)
    path.write_text(GRID.replace("128, 256]", "128, 9]"))
    with pytest.raises(ConfigError, match="a_100_pool_size-9: pool_size=9"):
        read_grid(path, tmp_path)


def test_finished_runs_are_skipped_and_changed_ones_are_not(grid):
    assert len(prepare(grid)) == 18
    finish(grid)
    assert prepare(grid) == []
    grid.runs[3].run.optimizer.lr = 1e-3
    assert [entry.name for entry in prepare(grid)] == [grid.runs[3].name]
    assert final_validation(grid.runs[3]) is None  # its old log is gone


def test_slurm_array_has_a_line_per_run(grid, tmp_path):
    out = tmp_path / "out"
    script = write_slurm(grid, out, hours=2, at_once=3, extra=["--partition=big"]).read_text()
    assert "#SBATCH --array=0-17%3\n" in script and "#SBATCH --time=120\n" in script
    assert "#SBATCH --partition=big\n" in script
    assert len((out / "runs.txt").read_text().splitlines()) == 18


def test_report_leaves_out_nan_and_hides_paths(grid, tmp_path):
    def loss(entry):
        usual = 1 + 50 / entry.num_parameters**0.4 + 9 / entry.num_samples**0.5
        return float("nan") if entry.name == "b_320_pool_size-128" else usual

    finish(grid, loss)
    assert sum(result.loss("valid_loss") is None for result in collect(grid)) == 1
    fits = fit_groups(grid, "valid_loss", resamples=5)
    assert [fit.label for fit in fits] == ["pool_size 128", "pool_size 256"]
    assert fits[0].left_out == {"b_320_pool_size-128": "valid_loss is nan"}
    write_json(tmp_path / "fit.json", fits, [1e6])
    write_report(tmp_path, fits, [1e6])
    text = (tmp_path / "report.md").read_text() + (tmp_path / "fit.json").read_text()
    assert str(tmp_path) not in text and "beyond the data" in text
    assert (tmp_path / "scaling_1.png").stat().st_size > 5000


def test_the_page_has_tables_where_the_markdown_has_them(grid, tmp_path):
    finish(grid)
    write_report(tmp_path, fit_groups(grid, "valid_loss", resamples=5), [1e6, 2e6])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table>") == 2 * 3  # runs, parameters and predictions of both groups
    assert "<th>largest model at</th>" in page and "<td>a_320_pool_size-256</td>" in page
    assert "|---" not in page and "<p>|" not in page
    first, second = page.index("<th>parameter</th>"), page.index("<th>largest model at</th>")
    assert page.index("intervals from resampled residuals") < first < second  # as it is written
    text = (tmp_path / "report.md").read_text()
    assert text.count("\n|---|") == 6 and "\n| 1,000,000 samples | " in text


def test_sizes_are_optional(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("recipe: tiny/finetune\nsamples: [64, 128]\n")
    runs = read_grid(path, tmp_path, data=tmp_path).runs
    assert [entry.name for entry in runs] == ["tiny_64", "tiny_128"]
    path.write_text("recipe: tiny/finetune\n")
    with pytest.raises(ConfigError, match="samples is missing"):
        read_grid(path, tmp_path)


def plan(tmp_path: Path, capsys, text: str) -> str:
    (tmp_path / "grid.yaml").write_text(text)
    words = ["plan", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]
    assert main([*words, "--data", "demo"]) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "out" / "plan.md").read_text()
    return shown


def test_the_plan_names_groups_that_are_too_small(tmp_path, capsys):
    assert "No law" not in plan(tmp_path, capsys, GRID)
    for line, reason in {
        "samples: [100, 320]": "6 runs: 5 parameters need at least 7",
        "samples: [100, 320, 330]": "2 different sample counts: an exponent needs at least 3",
    }.items():
        shown = plan(tmp_path, capsys, GRID.replace("samples: [100, 320, 1000]", line))
        for size in (128, 256):
            assert f"No law can be fitted to pool_size {size}: {reason}" in shown
    shown = plan(tmp_path, capsys, "recipe: tiny/finetune\nsamples: [64, 128, 256, 512]\n")
    assert "No law can be fitted to these runs: 4 runs: 3 parameters need at least 5; " in shown


def test_the_smallest_grid_of_the_page_is_large_enough(tmp_path, capsys):
    page = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
    text = page.split("```yaml\n")[1].split("```")[0]
    shown = plan(tmp_path, capsys, text)
    assert "No law" not in shown
    fewer = re.sub(r", \d+\]", "]", text)
    assert fewer != text and "No law can be fitted" in plan(tmp_path, capsys, fewer)


def test_initial_weights_of_each_size_and_seed(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID + "seeds: [1, 2]\nstart: 'start/{size}-{seed}'\n")
    runs = read_grid(path, tmp_path / "out", data=tmp_path / "data").runs
    starts = {run.name: run.run.checkpoint.pretrained_checkpoint for run in runs}
    assert starts["c_100_pool_size-128_seed-2"] == str(tmp_path / "data" / "start" / "c-2")
    with pytest.raises(ConfigError, match="start is a folder below --data, which is not given"):
        read_grid(path, tmp_path / "out")
