"""`croc chaos`, as a user calls it."""

import pytest

from megatron_croc.cli import chaos
from megatron_croc.verification.faults import scenarios
from megatron_croc.verification.faults.promises import BrokenPromiseError


@pytest.mark.distributed
def test_a_kept_and_a_broken_promise(monkeypatch, capsys):
    def broken(place, save):
        raise BrokenPromiseError("the curve\ndiffers")

    monkeypatch.setitem(scenarios.SCENARIOS, "sigterm", ("made up", "nothing", broken))
    assert chaos.main(["--only", "sigusr1", "--only", "sigterm"]) == 1
    head, _, kept, wrong, verdict = capsys.readouterr().out.splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    row = dict(zip(columns, (cell.strip() for cell in kept.strip("|").split("|")), strict=True))
    assert row["result"].startswith("kept")
    assert row["samples seen exactly once"] == "yes"
    assert row["steps lost"] == "0"
    assert float(row["s to recover"]) > 0
    assert "BROKEN: the curve differs" in wrong
    assert verdict == "1 of 2 promises kept"


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(capsys):
    assert chaos.main(["--only", "torchrun-restart"]) == 0
    assert "| yes | 1 |" in capsys.readouterr().out


def test_the_faults_are_listed(capsys):
    assert chaos.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(scenarios.SCENARIOS)
