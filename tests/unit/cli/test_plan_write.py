"""`croc plan --write`: the file is the run that was planned, for the commands it names."""

import json
import re
from pathlib import Path

import pytest

from megatron_croc.cli import check, plan
from megatron_croc.config.base import to_tree
from megatron_croc.planning.layouts import LAYOUT
from megatron_croc.recipes import get_recipe
from megatron_croc.recipes.command_line import parse_run
from megatron_croc.recipes.run_file import as_run_file

PLAN = "--recipe croc_7b/pretrain_croc --gpus 16 --text-tokens 400 --global-batch-size 64"


def make(file: Path, capsys: pytest.CaptureFixture[str], words: str = PLAN) -> str:
    assert plan.main([*words.split(), "--write", str(file)]) == 0
    return capsys.readouterr().out


def test_check_of_the_written_file_gives_the_same_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    printed = make(tmp_path / "run.yaml", capsys)
    row = next(line for line in printed.splitlines() if line.startswith("| tp"))
    planned = row.split("|")[5].strip()
    named = next(line for line in printed.splitlines() if line.startswith("croc check "))
    assert check.main(named.split()[2:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"(tensors {planned}, " in lines[-2] and "--text-tokens 400 " in lines[-2]
    title = next(n for n, line in enumerate(lines) if line.startswith("memory of one rank"))
    assert lines[title + 2].split()[:2] == ["0", planned]


def test_the_written_run_is_the_planned_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.yaml"
    printed = make(file, capsys)
    run = parse_run(["--config", str(file)], prog="", description="")
    flags = next(line for line in printed.splitlines() if line.startswith("--tensor"))
    words = ["--recipe", "croc_7b/pretrain_croc", "--global-batch-size", "64", *flags.split()]
    assert to_tree(run) == to_tree(parse_run(words, prog="", description=""))
    text = file.read_text()
    assert "recipe: croc_7b/pretrain_croc\n" in text and "  global_batch_size: 64\n" in text
    assert "seq_length" not in text  # what the recipe says is not repeated
    assert all(f"  {path.rpartition('.')[2]}: " in text for path in LAYOUT)


def test_the_commands_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "my run.yaml"
    printed = make(file, capsys)
    assert f"croc check --config '{file}' --world-size 16 --gpu h100 --text-tokens 400" in printed
    train = f"torchrun --nnodes 2 --nproc-per-node 8 -m megatron_croc train --config '{file}'\n"
    assert printed.endswith(train)
    assert f"# {train}" in file.read_text()
    one = make(file, capsys, "--recipe tiny/finetune --gpus 1")
    assert one.endswith(f"\ncroc train --config '{file}'\n")


def test_json_stays_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert len(json.loads(make(tmp_path / "run.yaml", capsys, f"{PLAN} --json"))) == 5
    assert (tmp_path / "run.yaml").exists()


def test_a_file_written_by_hand_is_not_replaced(tmp_path: Path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: tiny/finetune\n")
    words = ["--config", str(file), "--gpus", "1", "--write", str(file)]
    assert plan.main(words) == 1
    assert f"error: --write {file}: exists and was not written by croc" in capsys.readouterr().err
    assert file.read_text() == "recipe: tiny/finetune\n"
    other = tmp_path / "other.yaml"
    words[-1] = str(other)
    assert plan.main(words) == plan.main(words) == 0  # its own file is
    assert plan.main([*words[:-1], str(tmp_path / "none" / "run.yaml")]) == 1
    assert "run.yaml: cannot be written" in capsys.readouterr().err


def test_nothing_is_written_when_nothing_fits(tmp_path: Path, capsys):
    words = "--recipe croc_13b/finetune --gpus 2 --gpu a100-40 --write"
    assert plan.main([*words.split(), str(tmp_path / "run.yaml")]) == 1
    assert re.search(r"lacks \d+ GiB", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_recipe_is_written_from_the_defaults(tmp_path: Path):
    run = get_recipe("tiny/finetune")
    run.data.data_path = ("a", "b")
    file = tmp_path / "run.yaml"
    file.write_text(as_run_file(run, None, comment="one\n\ntwo"))
    assert file.read_text().startswith("# Written by croc: one\n#\n# two\n")
    again = parse_run(["--config", str(file)], prog="", description="")
    assert to_tree(again) == to_tree(run)
