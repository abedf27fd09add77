"""Prediction of a larger run beside the run (benchmarks/evidence/prediction.py)."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "evidence" / "prediction.py"


@pytest.fixture(scope="module")
def prediction():
    spec = importlib.util.spec_from_file_location("prediction", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(tmp_path: Path, losses: dict[str, float]) -> tuple[Path, Path]:
    fit, runs = tmp_path / "fit.json", tmp_path / "runs"
    predicted = {"loss": 1.1, "interval": [1.0, 1.2], "doubt": None}
    fit.write_text(json.dumps([{"metric": "valid_loss", "law": {}, "predictions": [predicted]}]))
    os.utime(fit, (1000, 1000))
    for name, loss in losses.items():
        (runs / name).mkdir(parents=True)
        rows = [{"iteration": 5, "valid_loss": 9.0}, {"loss": 3}, {"valid_loss": loss}]
        (runs / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return fit, runs


def test_the_error_is_relative_to_the_mean_of_the_runs(tmp_path, prediction, capsys):
    fit, runs = write(tmp_path, {"seed-1": 0.9, "seed-2": 1.1})
    prediction.main(["--fit", str(fit), "--runs", str(runs), "--out", str(tmp_path / "p.json")])
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["mean"] == pytest.approx(1.0)
    assert found["relative_error"] == pytest.approx(0.1)
    assert found["predicted_at"] < min(found["ended_at"].values())
    assert "error of the prediction +10.0%" in capsys.readouterr().out


def test_a_run_that_is_older_than_the_prediction_is_refused(tmp_path, prediction):
    fit, runs = write(tmp_path, {"seed-1": 1.0})
    os.utime(runs / "seed-1" / "metrics.jsonl", (900, 900))
    with pytest.raises(SystemExit, match="no prediction"):
        prediction.compare(fit, runs)
    (runs / "seed-1" / "metrics.jsonl").write_text('{"loss": 1}')
    with pytest.raises(SystemExit, match="has no valid_loss"):
        prediction.compare(fit, runs)
