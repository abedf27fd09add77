import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_croc.log import get_logger, log_on_rank_zero, log_once

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages that the project's logger writes."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    monkeypatch.setattr(get_logger("megatron_croc"), "handlers", [Ear()])
    return heard


def test_names_are_the_modules(lines: list[str]):
    get_logger("megatron_croc.data.loader").info("read %d", 3)
    assert lines == ["INFO megatron_croc.data.loader: read 3"]
    assert not get_logger("megatron_croc").propagate


def test_only_rank_zero_speaks_for_all(lines: list[str], monkeypatch: pytest.MonkeyPatch):
    logger = get_logger("megatron_croc.x")
    monkeypatch.setenv("RANK", "1")
    log_on_rank_zero(logger, logging.INFO, "from rank 1")
    monkeypatch.setenv("RANK", "0")
    log_on_rank_zero(logger, logging.INFO, "from rank 0")
    assert lines == ["INFO megatron_croc.x: from rank 0"]


def test_once_is_once_per_message(lines: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    logger = get_logger("megatron_croc.y")
    for number in (1, 1, 2, 2, 1):
        log_once(logger, logging.WARNING, "number %d", number)
    assert lines == ["WARNING megatron_croc.y: number 1", "WARNING megatron_croc.y: number 2"]


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [
        ("1", ["all is well", "WARNING: odd", "of the job"]),
        ("2", ["[rank 0] all is well", "[rank 0] WARNING: odd", "of the job"]),
    ],
)
def test_a_line_holds_no_more_than_is_needed(num_ranks, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", num_ranks)
    monkeypatch.setenv("RANK", "0")
    root, stream = get_logger("megatron_croc"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(root.handlers[0].formatter)
    monkeypatch.setattr(root, "handlers", [handler])
    get_logger("megatron_croc.z").info("all is well")
    get_logger("megatron_croc.z").warning("odd")
    log_on_rank_zero(get_logger("megatron_croc.z"), logging.INFO, "of the job")
    assert [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()] == expected


def test_libraries_are_silent_and_other_code_is_heard():
    """Imports any module of the project first; neither is a filter left out nor one too many."""
    program = (
        "import megatron_croc.training.loop, warnings, logging\n"
        "warnings.warn('of the user')\n"
        "warnings.warn('of the user too', FutureWarning)\n"
        "warnings.warn_explicit('of a neighbour', UserWarning, 'x.py', 1, 'megatron.coreless')\n"
        "logging.getLogger('torch.utils.cpp_extension').warning('a compiler is missing')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": f"{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    assert [re.split(r"[:\]] ", line)[-1] for line in told] == [
        "of the user",
        "of the user too",
        "of a neighbour",
        "a compiler is missing",
    ]


def test_torch_says_nothing_about_the_machine(tmp_path: Path):
    """A build for CUDA without a GPU, beside the old pynvml package: both write at import."""
    (tmp_path / "pynvml.py").write_text(
        "import warnings\n"
        "warnings.warn('The pynvml package is deprecated. Use another', FutureWarning)\n"
    )
    program = (
        "import megatron_croc.log, torch\n"
        "torch.cuda._is_compiled, torch.cuda.is_available = lambda: True, lambda: False\n"
        "torch.version.cuda = '13.0'\n"
        "from torch.utils.cpp_extension import CUDA_HOME\n"
        "import pynvml\n"
        "print(CUDA_HOME)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"CUDA_HOME": "/cuda", "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("/cuda\n", "")
