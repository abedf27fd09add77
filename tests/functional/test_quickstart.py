"""The next steps that examples/quickstart/run.sh prints; its commands are stubs here."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_croc.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder and the end of the output, after a run whose commands do nothing."""
    bin_folder, out = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("out")
    for name in ("croc", "torchrun"):
        (bin_folder / name).write_text("#!/bin/sh\n")
        (bin_folder / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / "examples" / "quickstart" / "run.sh", out],
        env=os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return out, done.stdout


def test_the_path_of_the_report_is_printed(printed: tuple[Path, str]):
    out, text = printed
    assert f"The report: {out.resolve()}/report/report.html\n" in text
    assert f'python -m webbrowser "file://{out.resolve()}/report/report.html"' in text


def test_three_commands_come_next(printed: tuple[Path, str]):
    out, text = printed
    lines = text.split("Next, in", 1)[1].replace("\\\n", " ").splitlines()
    next_commands = [shlex.split(line, comments=True) for line in lines if line.startswith("  ")]
    assert [words[0] for words in next_commands] == ["python", "croc", "less"]
    assert (ROOT / next_commands[2][1]).is_file()
    given = dict(zip(next_commands[1][2::2], next_commands[1][3::2], strict=True))
    assert given["--model"] == f"{out}/finetune"
    assert given["--image"] == f"{out}/demo/images/003999.jpg"  # the last of 4000


def test_the_question_is_a_command_that_croc_takes(printed: tuple[Path, str], capsys):
    """It fails for the model that the stubs did not train, and for nothing before that."""
    _, text = printed
    (line,) = [x for x in text.replace("\\\n", " ").splitlines() if x.startswith("  croc ")]
    words = shlex.split(line)[1:]
    assert words[0] in COMMANDS
    words[words.index("--image") + 1] = str(ROOT / "docs" / "parallelism" / PICTURE)
    assert main(words) == 1
    assert words[words.index("--model") + 1] in capsys.readouterr().err


PICTURE = next(p.name for p in (ROOT / "docs" / "parallelism").iterdir() if p.suffix == ".png")
