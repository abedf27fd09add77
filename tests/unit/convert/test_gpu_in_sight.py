"""Conversion computes on the CPU, on a machine with a GPU as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_croc.errors import CheckpointError
from tests.unit.convert.families import save_family


def run(*statements: str) -> subprocess.CompletedProcess:
    """In a process that sees a GPU, which cannot be used."""
    code = "\n".join(["import tests.support.gpu_in_sight", *statements])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def command(name: str, **flags: Path) -> str:
    """A statement that runs a command of cli.convert."""
    words = [word for flag, path in flags.items() for word in (f"--{flag}", str(path))]
    words = [name, *(word.replace("_", "-") if word[:2] == "--" else word for word in words)]
    return f"assert main({words}) == 0"


def test_import_export_and_verify_leave_it_alone(tmp_path):
    llm, vision = save_family(tmp_path, "vicuna + clip")
    start, export = tmp_path / "start", tmp_path / "hf"
    done = run(
        "from megatron_croc.cli.convert import main",
        command("import", from_hf=llm, vision=vision, save=start),
        command("export", load=start, to=export),
        command("verify", load=start, hf=export),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout

    # `generate` exports a checkpoint in a process that keeps its GPU.
    done = run(
        "from pathlib import Path",
        "from megatron_croc.convert.exporting import export_huggingface",
        "from megatron_croc.parallel.device import has_cuda",
        f"export_huggingface(Path({str(start)!r}), Path({str(tmp_path / 'again')!r}))",
        "assert has_cuda()",
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_process_that_computes_on_a_gpu_is_told_how_to_convert(monkeypatch):
    from megatron_croc.convert import importing

    monkeypatch.setattr(importing, "has_cuda", lambda: True)
    with (
        pytest.raises(CheckpointError, match=r"on the CPU.*croc convert.*compute_on_cpu\(\)"),
        importing.one_process(seed=1),
    ):
        pass


def test_a_gpu_in_use_cannot_be_hidden():
    done = run(
        "import torch; torch.cuda.is_initialized = lambda: True",
        "from megatron_croc.cli.convert import main",
        "assert main(['verify', '--load', '/', '--hf', '/']) == 1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.strip().endswith("uses a GPU already; start a new one for the CPU")
