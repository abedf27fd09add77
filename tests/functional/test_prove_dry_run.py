"""Dry run of the whole list of `croc prove`, at sizes for a CPU."""

import subprocess
import sys
from pathlib import Path

from megatron_croc.rehearsal.replay.costs import read_costs
from megatron_croc.verification.prove.result import read_result
from megatron_croc.verification.prove.stages import STAGES

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"step_croc_13b", "step_victor_7b", "step_fp8", "beside_release"}
"""Those of croc_7b at this size, and those that need Transformer Engine or the released code."""


def test_every_stage_runs(tmp_path: Path):
    words = ["prove", "--small", "--minutes", "200", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_croc", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    results = {stage.name: read_result(tmp_path / f"{stage.name}.json") for stage in STAGES}
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    for name, result in results.items():
        assert result is not None, (name, told)
        assert result.status == ("skipped" if name in LEFT_OUT else "passed"), (name, told)
        assert result.is_small
    read_costs(tmp_path / "costs" / "costs.json")  # `croc rehearse` can use it
    # Each script writes what the cards read.
    with_figures = {stage.name for stage in STAGES if stage.figures.__name__ != "no_figures"}
    for name in with_figures - LEFT_OUT - {"attention"}:  # its figures are about a row with a span
        assert results[name].figures, (name, results[name].commands)
