"""Time limits of the watchdog, in tenths of a second."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_croc.recipes import get_recipe
from megatron_croc.training.safety import watchdog
from megatron_croc.training.safety.heartbeat import enter

LIMIT_S = 0.2


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Errors logged for a run that continues from step 4; a single process is not ended."""
    told: list[str] = []
    monkeypatch.setattr(watchdog.logger, "error", lambda form, *args: told.append(form % args))
    run = get_recipe("tiny/pretrain_croc")
    run.checkpoint.save = str(tmp_path)
    run.reliability.stall_timeout_minutes = LIMIT_S / 60
    run.reliability.first_step_timeout_minutes = 1.0
    with watchdog.watch_over(run.reliability, run.log_folder, first_step=5):
        yield told


def test_only_the_first_step_may_take_longer(reports: list[str]):
    for step, says in ((5, []), (6, ["this rank has stood at step 6, forward, micro-batch 0"])):
        enter("forward", iteration=step, micro_batch=0)
        time.sleep(2 * LIMIT_S)
        assert [report.partition(" for ")[0] for report in reports] == says
