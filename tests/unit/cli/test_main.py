"""The command `croc`: every subcommand answers, and every fault is one line."""

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_croc import __version__
from megatron_croc.cli.main import COMMANDS, main
from megatron_croc.errors import DataError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert end.value.code == 0
    assert f"croc {name}" in capsys.readouterr().out.split("\n\n", 1)[1]


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n  {name} ") == 2 for name in COMMANDS)
    assert main(["data"]) == 0
    listed = capsys.readouterr().out.splitlines()[2:]
    num_data = sum(name.startswith("data ") for name in COMMANDS)
    assert [line.split()[0] for line in listed] == ["data"] * num_data > ["data"] * 5


@pytest.mark.parametrize(
    ("words", "told"),
    [(["dta", "demo"], "did you mean croc data demo?"), (["nonsense"], "croc --help lists")],
)
def test_an_unknown_command_is_one_line(words, told, capsys) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert f"megatron_croc {__version__}\n" in shown
    assert f"torch {metadata.version('torch')}\n" in shown
    assert f"megatron-core {metadata.version('megatron-core')}\n" in shown


def test_a_fault_of_the_user_is_one_line(monkeypatch, capsys) -> None:
    def fail(words: list[str]) -> int:
        raise DataError("shards: no such folder")

    monkeypatch.setattr(importlib.import_module("megatron_croc.cli.recipes"), "main", fail)
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err == "error: shards: no such folder\n"


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m megatron_croc check --recipe tiny/finetune --world-size 1"
    script = f"{command} | head -n 1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") <= 1


@pytest.mark.parametrize("path", sorted((ROOT / "tools").rglob("*.py")), ids=lambda p: p.stem)
def test_a_tool_is_a_command_by_another_path(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 10  # no logic lives there
    named = text.split("`croc ", 1)[1].split("`", 1)[0]
    assert any(command.startswith(named) for command in COMMANDS)
    assert f"main([{', '.join(repr(word) for word in named.split())}".replace("'", '"') in text
