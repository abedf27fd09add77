"""`croc convert`: a folder that is not there is told by the name of its option."""

from pathlib import Path

import pytest

from megatron_croc.cli.convert import main


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["import", "--from-hf", "MISSING", "--save", "out"], "--from-hf"),
        (["import", "--from-hf", "HERE", "--vision", "MISSING", "--save", "out"], "--vision"),
        (["verify", "--load", "HERE", "--hf", "MISSING"], "--hf"),
    ],
)
def test_a_missing_folder(tmp_path: Path, capsys, monkeypatch, words: list[str], option: str):
    monkeypatch.setattr("megatron_croc.parallel.device.compute_on_cpu", lambda: None)
    (tmp_path / "HERE").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} MISSING: no such folder") and "JSON" not in error
