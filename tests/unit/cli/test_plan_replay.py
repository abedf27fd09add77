"""`croc plan --replay` without children: order, dropped layouts, time limit, cache, bad options."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_croc.cli import plan
from megatron_croc.rehearsal import cache, settle
from megatron_croc.rehearsal.run import Rehearsal
from megatron_croc.rehearsal.unrolled import NoSteadyStateError

PLAN = "--recipe croc_7b/pretrain_croc --gpus 8 --text-tokens 200"


class Children:
    """Stands for rehearsals and replays: each layout gets the outcome that a test asks for."""

    def __init__(self, of: Callable[[int], float | str | Exception | None]) -> None:
        self.of, self.jobs = of, []

    def perform_all(
        self, rehearsals: list[Rehearsal], *, on_done: Callable[[Rehearsal], None], **_: Any
    ) -> None:
        self.jobs += rehearsals
        for number, rehearsal in enumerate(rehearsals):
            if self.of(number) is not None:  # else the time is up
                on_done(rehearsal)

    def gather(self, rehearsal: Rehearsal) -> Any:
        found = self.of(self.jobs.index(rehearsal))
        if isinstance(found, Exception):
            raise found
        parts = {"compute": found, "bubble": 0.0, "host": 0.0, "exposed": {}, "waits": {}}
        faults = [SimpleNamespace(text=found)] if isinstance(found, str) else []
        timeline = SimpleNamespace(seconds=found, source="made up", **parts)
        return SimpleNamespace(faults=faults, timeline=timeline)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Children]]:
    def make(of: Callable[[int], Any]) -> Children:
        made = Children(of)
        monkeypatch.setattr(settle, "perform_all", made.perform_all)
        monkeypatch.setattr(settle, "gather", made.gather)
        return made

    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    yield make


def layouts(text: str) -> list[str]:
    return re.findall(r"^\| (tp[^|]*) \|", text, re.MULTILINE)


def test_the_replay_settles_order_flags_and_file(
    children: Callable[..., Children], capsys: Any, tmp_path: Path
) -> None:
    assert plan.main(PLAN.split()) == 0
    quick = capsys.readouterr().out
    assert "--replay settles it by replayed steps" in quick
    by_formula = layouts(quick)
    outcomes = [0.3, "deadlock: 2 ranks", 0.2, None, NoSteadyStateError("no steady state")]
    made = children(lambda number: outcomes[number])
    file = tmp_path / "run.yaml"
    assert plan.main([*PLAN.split(), "--replay", "--write", str(file)]) == 0
    captured = capsys.readouterr()
    text = captured.out
    assert layouts(text) == [by_formula[2], by_formula[0]]
    assert f"dropped: {by_formula[1]}: deadlock: 2 ranks\n" in text
    assert (
        f"not replayed: {by_formula[3]}: not done after 30 minutes; what was done is kept" in text
    )
    assert f"not replayed: {by_formula[4]}: no steady state" in text
    assert re.search(r"\| 0\.200 \| \d\.\d{3} \|", text)  # the replay's, the formula's
    assert "replay: made up" in text
    assert file.read_text().startswith(f"# Written by croc: {by_formula[2]} for 8 x h100")
    assert [job.title for job in made.jobs] == [f"{name}, " for name in by_formula]
    # Times and faults are kept; what was not done is tried again, and is all that is.
    made = children(lambda number: 0.1)
    assert plan.main([*PLAN.split(), "--replay", "--json"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [job.title for job in made.jobs] == [f"{name}, " for name in by_formula[3:]]
    assert [row["replay"]["seconds"] for row in rows] == [0.1, 0.1, 0.2, 0.3, None]
    assert rows[2]["flags"] in text  # those of the fastest layout with a time
    assert rows[-1]["replay"]["is_faulty"] and rows[-1]["layout"] == by_formula[1]
    assert "3 of 5 layouts were replayed before" in captured.err
    # Other samples are another time.
    made = children(lambda number: 0.1)
    assert plan.main([*PLAN.split(), "--replay", "--json", "--images", "1.5"]) == 0
    assert len(made.jobs) == 5


def test_no_layout_has_a_time(children: Callable[..., Children], capsys: Any) -> None:
    children(lambda number: None)
    assert plan.main([*PLAN.split(), "--replay"]) == 1
    captured = capsys.readouterr()
    assert (
        captured.out == "" and "error: no layout was replayed: tp1 mbs2: not done" in captured.err
    )


def test_few_micro_batches_are_rehearsed_and_all_are_replayed(
    children: Callable[..., Children],
) -> None:
    made = children(lambda number: 0.1)
    words = [*PLAN.split(), "--replay", "--json", "--global-batch-size", "256"]
    assert plan.main([*words, "--balance-replicas", "8"]) == 0
    assert any(job.run.num_microbatches(8) < (job.micro_batches or 0) for job in made.jobs)
    for job in made.jobs:
        replicas = job.run.parallel.data_parallel_size(8)
        recorded = job.run.num_microbatches(8)
        assert job.micro_batches is not None and job.loads is not None
        wanted = 256 // (replicas * job.run.training.micro_batch_size)
        assert recorded <= job.micro_batches == wanted
        assert [len(its) for its in job.loads] == [wanted] * replicas
        every = [load["language_model"] for its in job.loads for load in its]
        assert sum(every) / len(every) == pytest.approx(1.0, abs=0.03)
        sums = [sum(load["language_model"] for load in its) for its in job.loads]
        assert max(sums) / min(sums) < 1.003  # balanced; 1.04 and more as drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--jobs 0", "--jobs 0: must be 1 or more"),
        ("--time-limit 0", "--time-limit 0: must be above 0"),
        ("--costs /nowhere.json", "/nowhere.json"),
        ("--transformer-impl te", "transformer_impl=te"),
        ("--gpus 2048 --global-batch-size 2048", "--replay takes up to 1,024 GPUs, not 2,048"),
    ],
)
def test_bad_input_is_one_line_before_a_child_starts(
    children: Callable[..., Children], words: str, message: str, capsys: Any
) -> None:
    made = children(lambda number: 0.1)
    assert plan.main([*PLAN.split(), "--replay", *words.split()]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and made.jobs == []
