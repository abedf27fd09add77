"""Comparison of two training logs, step by step."""

import json
import math
from pathlib import Path

from megatron_croc.errors import DataError

COMPARED = {"text_loss": 1.0, "reconstruction_loss": 1.0, "valid_loss": 1.0, "grad_norm": 10.0}
"""Columns of metrics.jsonl that a layout or a restart must not change, and what the bound is
multiplied by: a gradient's norm shows the weights' tiny differences ten times as large."""

Rows = dict[int, dict[str, float]]


def read_log(path: Path) -> Rows:
    """Rows of metrics.jsonl by iteration; of a repeated step, the last."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.exists():
        raise DataError(f"{file}: no such log; name a folder that training wrote to (--save)")
    rows: Rows = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.setdefault(int(row["iteration"]), {}).update(row)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}, line {number}: not a row of metrics ({error})") from error
    return rows


def compare_logs(a: Path, b: Path, *, bound: float) -> int:
    """Print the largest difference of each column and where it first exceeds the bound."""
    first, second = read_log(a), read_log(b)
    common = sorted(first.keys() & second.keys())
    if not common:
        raise DataError(f"{a} and {b} have no iteration in common")
    print(f"{len(common)} iterations in common, {common[0]} to {common[-1]}")
    failed = False
    for name, factor in COMPARED.items():
        errors = {
            step: _relative(first[step][name], second[step][name])
            for step in common
            if name in first[step] and name in second[step]
        }
        if not errors:
            continue
        worst = max(errors, key=errors.__getitem__)
        above = [step for step, error in errors.items() if not error <= factor * bound]
        failed |= bool(above)
        note = f", above {factor * bound:.0e} from iteration {above[0]}" if above else ""
        print(f"  {name:20s} largest {errors[worst]:.2e} at iteration {worst}{note}")
    print("FAILED" if failed else "PASSED")
    return int(failed)


def _relative(a: float, b: float) -> float:
    if a == b:
        return 0.0
    error = abs(a - b) / max(abs(a), abs(b))
    return error if math.isfinite(error) else math.inf
