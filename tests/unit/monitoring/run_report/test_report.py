"""The report's curves, tables, page and error messages, on made-up metrics."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from megatron_croc.checkpoint.state import LATEST_FILE, TrainState, iteration_folder
from megatron_croc.cli.main import main
from megatron_croc.config.base import to_yaml
from megatron_croc.errors import DataError
from megatron_croc.monitoring.run_report.accuracy import answer_sections
from megatron_croc.monitoring.run_report.page import Section, write_page
from megatron_croc.monitoring.run_report.report import curve_section
from megatron_croc.monitoring.run_report.stages import (
    as_text,
    check_files,
    load_stage,
    loss_table,
    optimizer_table,
)
from megatron_croc.recipes import get_recipe


def write_stage(run_dir: Path, stage: str, *, world_size: int | None = None, tp: int = 1) -> Path:
    run = get_recipe(f"tiny/{stage}")
    run.parallel.tensor_model_parallel_size = tp
    run.data.valid_data_path = (str(run_dir / "no-such-shards"),)
    folder = run_dir / stage
    checkpoint = iteration_folder(folder, 30)
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.yaml").write_text(to_yaml(run))
    TrainState(stage=stage, iteration=30).save(checkpoint)
    (folder / LATEST_FILE).write_text("30\n")
    rows = [train_row(i, run.reconstructs, world_size) for i in (10, 20, 30)]
    rows.append({"iteration": 30, "valid_loss": 1.5, "valid_text_loss": 1.25})
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def train_row(iteration: int, reconstructs: bool, world_size: int | None = None) -> dict:
    loss = 30.0 / iteration
    row = {"iteration": iteration, "loss": loss, "text_loss": loss, "grad_norm": loss / 10}
    row |= {"tokens_per_second": 1000.0 + iteration, "seconds_per_step": 0.5}
    row |= {"lr/projector": 1e-3, "lr/language_model": 1e-3}
    if reconstructs:
        row |= {"reconstruction_loss": loss / 100, "pool_usage": 0.25, "matched_distance": 9.5}
        row |= {"lr/prompt_pool": 5e-4}
    return row if world_size is None else {**row, "world_size": world_size}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tables_show_how_far_each_stage_came(tmp_path: Path):
    write_stage(tmp_path, "pretrain_mlp", world_size=2)
    write_stage(tmp_path, "pretrain_croc", tp=2)
    stages = [load_stage(tmp_path, name) for name in ("pretrain_mlp", "pretrain_croc")]

    head, mlp, croc = (dict(enumerate(line)) for line in loss_table(stages))
    column = {name: number for number, name in head.items()}
    assert mlp[column["layout"]] == "TP 1 x PP 1 x DP 2"
    assert mlp[column["text loss"]] == "3.000 -> 1.000"
    assert mlp[column["held-out text"]] == "1.250"
    assert mlp[column["reconstruction"]] == "-"
    assert mlp[column["tokens/s"]] == "1,020"
    assert croc[column["layout"]] == "TP 2 x PP 1"  # nothing says how many processes there were
    assert croc[column["reconstruction"]] == "0.0300 -> 0.0100"

    _, _, croc = optimizer_table(stages)
    assert croc[1:] == [
        "1.0e-03 projector, language model; 5.0e-04 prompt pool",
        "0.30 -> 0.10",
        "25.0% -> 25.0%",
        "9.50 -> 9.50",
    ]
    text = as_text(loss_table(stages[:1]))
    assert "pretrain_mlp" in text and "reconstruction" not in text


def test_curves_are_drawn_and_the_page_stands_on_its_own(tmp_path: Path):
    write_stage(tmp_path, "pretrain_mlp")
    write_stage(tmp_path, "pretrain_croc")
    stages = [load_stage(tmp_path, name) for name in ("pretrain_mlp", "pretrain_croc")]
    section = curve_section(stages, tmp_path)
    assert [p.name for p in section.pictures] == [
        "losses.png",
        "optimization.png",
        "pool_training.png",
    ]
    page = tmp_path / "report.html"
    write_page(page, title="a < b", lead="see `this`", sections=[section])
    content = page.read_text(encoding="ascii")
    assert content.count("data:image/png;base64,") == 3
    assert "<h1>a &lt; b</h1>" in content and "<code>this</code>" in content
    assert "3.000 &rarr; 1.000" in content
    assert "http" not in content.replace("data:image/png;base64", "").split("<img")[0]


def accuracy_row(kind: str, accuracy: float, *, is_above_chance: bool) -> dict:
    row = {"kind": kind, "num_questions": 40, "accuracy": accuracy, "chance": 0.25}
    row |= {"standard_error": 0.0625, "is_above_chance": is_above_chance}
    return row | {"most_common": None if kind == "all" else "red"}


def test_accuracy_is_shown_where_questions_were_asked(tmp_path: Path):
    folder = write_stage(tmp_path, "finetune")
    stage = load_stage(tmp_path, "finetune")
    assert answer_sections([stage]) == []
    rows = [
        accuracy_row("colour", 0.5, is_above_chance=True),
        accuracy_row("place", 0.25, is_above_chance=False),
        accuracy_row("count", 0.75, is_above_chance=True),
        accuracy_row("all", 0.5, is_above_chance=True),
    ]
    (folder / "accuracy.json").write_text(json.dumps(rows))
    (section,) = answer_sections([stage])
    assert section.tables[0][1:3] == [
        ["colour", "40", "50.0% \u00b1 6.2%", "25.0%", "+25.0% *", "red"],
        ["place", "40", "25.0% \u00b1 6.2%", "25.0%", "+0.0%", "red"],
    ]
    assert section.paragraphs[0] == (
        "Clearly above chance: count (75.0% right, 25.0% by chance), colour (50.0% right, 25.0% "
        "by chance). Not yet clearly above it: the other 1."
    )
    (folder / "accuracy.json").write_text(json.dumps(rows[1:2] + rows[-1:]))
    (section,) = answer_sections([stage])
    assert section.paragraphs[0].startswith("No type of question is clearly above chance (of 1)")
    (folder / "accuracy.json").write_text("[{}]")
    with pytest.raises(DataError, match="no report of accuracy"):
        answer_sections([stage])


def test_the_report_opens_with_what_was_learned(tmp_path: Path, monkeypatch):
    folder = write_stage(tmp_path, "pretrain_mlp")
    report = import_module("megatron_croc.monitoring.run_report.report")
    monkeypatch.setattr(report, "mask_section", lambda *_: Section(title="Attention masks"))
    rows = [accuracy_row("colour", 0.5, is_above_chance=True)]
    (folder / "accuracy.json").write_text(json.dumps(rows))
    page = report.write_report(tmp_path, [load_stage(tmp_path, "pretrain_mlp")], num_images=1)
    content = page.read_text()
    places = [content.index(w) for w in ("<h2>", "What the model has learned", "<h2>Training")]
    assert places == sorted(places)
    assert (
        content.split("</h2>", 1)[1].lstrip().startswith("<p>Clearly above chance: colour (50.0%")
    )


def test_parts_with_one_learning_rate_share_a_line(tmp_path: Path):
    write_stage(tmp_path, "pretrain_croc")
    stage = load_stage(tmp_path, "pretrain_croc")
    figures = import_module("megatron_croc.monitoring.run_report.curve_figures")
    assert [parts for _, parts in figures.equal_curves(stage)] == [
        ["projector", "language_model"],
        ["prompt_pool"],
    ]


def test_steps_done_again_after_a_resume_count_once(tmp_path: Path):
    read_metrics = import_module("megatron_croc.monitoring.run_report.stages").read_metrics
    valid = {"iteration": 20, "valid_loss": 9.0}
    first = [train_row(i, False) for i in (10, 20)] + [valid, train_row(30, False)]
    again = [{**train_row(20, False), "loss": -1.0}, {**valid, "valid_loss": -2.0}]
    write_rows(tmp_path / "metrics.jsonl", first + again)
    train, valid_rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["iteration"], row["loss"]) for row in train] == [(10, 3.0), (20, -1.0)]
    assert [row["valid_loss"] for row in valid_rows] == [-2.0]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: f.rename(f.with_name("elsewhere")), ("pretrain_mlp is missing", "--stages")),
        (lambda f: (f / "metrics.jsonl").unlink(), ("metrics.jsonl cannot be read", "--save")),
        (lambda f: (f / "metrics.jsonl").write_text(""), ("holds no training step yet",)),
        (lambda f: (f / "metrics.jsonl").write_text("{}\n"), ("metrics.jsonl:1 is no row",)),
        (lambda f: (f / LATEST_FILE).unlink(), ("no finished checkpoint", "--save")),
        (lambda f: None, ("no-such-shards", "run.yaml", "the folder training was started in")),
    ],
    ids=["no stage", "no metrics", "empty", "not a row", "no checkpoint", "no data"],
)
def test_faults_are_one_line_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, expected
):
    damage(write_stage(tmp_path, "pretrain_mlp"))
    assert main(["report", str(tmp_path), "--stages", "pretrain_mlp"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert all(words in captured.err for words in expected), captured.err
    assert not (tmp_path / "report").exists()


def test_a_stage_without_held_out_data_is_named(tmp_path: Path):
    write_stage(tmp_path, "pretrain_mlp")
    stage = load_stage(tmp_path, "pretrain_mlp")
    stage.run.data.valid_data_path = ()
    with pytest.raises(DataError, match="pretrain_mlp was trained without held-out data"):
        check_files(stage)


def test_cells_of_a_mask_tell_past_from_ahead():
    figures = import_module("megatron_croc.monitoring.run_report.mask_figures")
    hidden, past, ahead = figures.HIDDEN, figures.PAST, figures.AHEAD
    visible = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=bool)
    assert figures.cells(visible).tolist() == [
        [past, ahead, hidden],
        [past, past, hidden],
        [past, past, past],
    ]


def test_only_replaced_patches_are_greyed_out():
    grey_out = import_module("megatron_croc.monitoring.run_report.image_figures").grey_out
    pixels = np.full((9, 9, 3), 7, dtype=np.uint8)  # one pixel more than 2 x 2 patches cover
    out = grey_out(pixels, np.array([[True, False], [False, False]]))
    assert (out[1:4, 1:4] > 200).all()
    assert (out[5:8, 5:8] == 7).all() and (out[1:4, 5:8] == 7).all()
    assert (pixels == 7).all()
