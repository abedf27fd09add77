"""An export computes the same in another version of transformers, where one is at hand.

CROC_OTHER_PYTHON names the interpreter of an environment with that version.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.convert.families import save_family


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    from megatron_croc.convert.exporting import export_huggingface
    from megatron_croc.convert.importing import import_huggingface

    folder = tmp_path_factory.mktemp("family")
    llm, vision = save_family(folder, "qwen2 + siglip")
    import_huggingface(llm, folder / "start", vision_folder=vision)
    export_huggingface(folder / "start", folder / "hf")
    return folder / "hf"


def check(export: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_croc", "parity", "transformers", str(export), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def test_the_other_version_computes_the_same(export: Path):
    other = os.environ.get("CROC_OTHER_PYTHON")
    if other is None:
        pytest.skip("CROC_OTHER_PYTHON names no interpreter with another transformers")
    done = check(export, "--python", other)
    assert done.returncode == 0, done.stdout + done.stderr
    versions = {line.split()[1] for line in done.stdout.splitlines() if "generated" in line}
    assert len(versions) == 2, done.stdout


def test_a_difference_is_found_out(monkeypatch: pytest.MonkeyPatch, capsys):
    from megatron_croc.verification import transformers_versions

    keys: dict[str, list] = dict(missing=[], unexpected=[], mismatched=[])
    seen = keys | dict(logits=[0.0, 1.0], generated=[[1, 2]], prompts=[[1, 5]], answers=["a"])
    good = {"version": "1", "loaded": seen, "saved again": seen}
    assert transformers_versions.compare(good, good, training=[[1, 5]])
    for change in (
        dict(logits=[0.0, 1.1]),
        dict(logits=[0.0, float("nan")]),
        dict(generated=[[1, 3]]),
        dict(missing=["a"]),
        dict(prompts=[[1, 1, 5]]),
        dict(answers=["b"]),
    ):
        for place in ("loaded", "saved again"):
            bad = good | {place: seen | change}
            assert not transformers_versions.compare(good, bad, training=[[1, 5]])
    assert not transformers_versions.compare(good, good, training=[[1, 6]])


def test_prompts_of_training(tmp_path: Path):
    """The ids that both versions are compared with are those of croc generate."""
    from megatron_croc.verification.transformers_versions import training_prompts

    assert training_prompts(tmp_path) is None  # no tokenizer there


def test_bad_input_is_one_line(export: Path, tmp_path: Path):
    for arguments, words in (
        ((tmp_path,), "no export with its own code"),
        ((export, "--python", "/nowhere/python"), "--python /nowhere/python"),
    ):
        done = check(arguments[0], *arguments[1:])
        assert done.returncode == 1 and words in done.stderr
        assert done.stderr.count("\n") == 1
