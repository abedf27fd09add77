#!/usr/bin/env python
"""Error of a scaling law's prediction: the predicted loss beside those of runs made afterwards.

    python benchmarks/evidence/prediction.py --fit small/fit.json --runs larger/runs --out FILE

`croc scaling fit` writes the prediction before the larger runs begin; the dates are in the result.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def compare(fit: Path, runs: Path) -> dict[str, Any]:
    """Read the prediction of one group, and the last validation of each run.

    Raises:
        SystemExit: the fit has no single prediction, a run has no validation, or a run is older
            than the prediction.
    """
    (group,) = json.loads(fit.read_text(encoding="utf-8"))
    (predicted,) = group["predictions"]
    losses, dates = {}, {}
    for folder in sorted(runs.iterdir()):
        metrics = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        found = [row[group["metric"]] for row in rows if group["metric"] in row]
        if not found:
            raise SystemExit(f"error: {metrics} has no {group['metric']}: the run is not finished")
        if metrics.stat().st_mtime < fit.stat().st_mtime:
            raise SystemExit(f"error: {folder} ended before {fit} was written: no prediction")
        losses[folder.name] = found[-1]
        dates[folder.name] = _date(metrics)
    if not losses:
        raise SystemExit(f"error: no runs in {runs}")
    mean = sum(losses.values()) / len(losses)
    return {
        "metric": group["metric"],
        "law": group["law"],
        "predicted": predicted["loss"],
        "interval": predicted["interval"],
        "doubt": predicted["doubt"],
        "predicted_at": _date(fit),
        "seen": losses,
        "ended_at": dates,
        "mean": mean,
        "relative_error": predicted["loss"] / mean - 1,
    }


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def main(argv: Sequence[str] | None = None) -> None:
    """Print and write the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", type=Path, required=True, help="fit.json of the smaller runs")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the larger runs")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    options = parser.parse_args(argv)
    result = compare(options.fit, options.runs)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    low, high = result["interval"]
    print(f"predicted {result['predicted']:.4f} ({low:.4f} to {high:.4f})")
    print(f"seen {result['mean']:.4f}: {', '.join(f'{v:.4f}' for v in result['seen'].values())}")
    print(f"error of the prediction {result['relative_error']:+.1%}")


if __name__ == "__main__":
    main()
