"""Checkpoints after a power cut at any moment: a start finds a whole and right one."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_croc.checkpoint import publishing, saving
from megatron_croc.checkpoint.manifest import MANIFEST_FILE, find_damage
from megatron_croc.checkpoint.publishing import sweep
from megatron_croc.checkpoint.state import (
    LATEST_FILE,
    TrainState,
    iteration_folder,
    resume_candidates,
)
from tests.support.power_cut import Recorder, State
from tests.support.synthetic import tiny_run

Save = Callable[..., None]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return (tmp_path / "disk").resolve()


@pytest.fixture
def save(disk: Path, pg_collection, monkeypatch) -> Save:
    """Save one small tensor: save(iteration, value, iteration that the run resumed from)."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    value = [0.0]
    monkeypatch.setattr(
        saving,
        "checkpoint_content",
        lambda *_: {
            "model0": {
                "weight": ShardedTensor.from_rank_offsets("weight", torch.full((4,), value[0]))
            }
        },
    )
    run = tiny_run(keep_last=2)
    run.checkpoint.save = run.checkpoint.load = str(disk / "runs" / "a")

    def save_one(iteration: int, number: float, resumed_at: int, skipped: int = 0) -> None:
        value[0] = number
        saver = saving.CheckpointSaver(
            run.checkpoint,
            [],
            None,  # type: ignore[arg-type]
            pg_collection,
            settings="",
            resumed_at=resumed_at,
        )
        saver.save(TrainState(iteration=iteration, stage=run.stage, skipped_in_a_row=skipped))
        saver.close()

    return save_one


def next_start(root: Path) -> int:
    """Iteration that the next start takes; 0: none."""
    sweep(root)
    for folder in resume_candidates(root):
        if not find_damage(folder):
            assert TrainState.load(folder).iteration == int(folder.name[5:12])
            return int(folder.name[5:12])
    return 0


def started(states: list[State], tmp_path: Path) -> Iterator[tuple[State, Path]]:
    """Every state on a disk of its own."""
    for number, state in enumerate(states):
        folder = state.write_to(tmp_path / "after" / str(number))
        yield state, folder / "runs" / "a"
        shutil.rmtree(folder)


def test_saves_and_removals(disk: Path, save: Save, tmp_path: Path, record_property):
    with Recorder(disk) as recorder:
        for before, iteration in itertools.pairwise(range(4)):
            save(iteration, float(iteration), before)
            recorder.mark(iteration)
    states = recorder.states()
    record_property("states", len(states))
    assert len(states) > 200
    for state, root in started(states, tmp_path):
        promised = max(recorder.promised(state), default=0)
        assert promised <= next_start(root) <= promised + 1, (state.last, sorted(state.tree))


@pytest.mark.parametrize("tracked", [1, 2], ids=["set back to 1", "begun anew"])
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_name_that_is_taken(
    disk: Path, save: Save, tmp_path: Path, monkeypatch, tracked: int, exchanges: bool
):
    """The whole checkpoint of that name is never lost, and a start always finds a whole one."""
    root = disk / "runs" / "a"
    save(1, 1.0, 0)
    save(2, 2.0, 1)
    old = (root / "iter_0000002" / MANIFEST_FILE).read_bytes()
    (root / LATEST_FILE).write_text(f"{tracked}\n")
    if not exchanges:
        monkeypatch.setattr(publishing, "exchange", lambda *_: False)
    with Recorder(disk) as recorder:
        save(2, 22.0, tracked if tracked == 1 else 0)
        recorder.mark(2)
    assert len(recorder.states()) > 50
    for state, after in started(recorder.states(), tmp_path):
        assert next_start(after) >= max([tracked, *recorder.promised(state)])
        kept = [f.parent for f in after.glob(f"*/{MANIFEST_FILE}") if f.read_bytes() == old]
        assert kept and find_damage(kept[0]) == [], (state.last, sorted(state.tree))


def test_a_damaged_checkpoint_is_replaced(disk: Path, save: Save, tmp_path: Path):
    root = disk / "runs" / "a"
    save(1, 1.0, 0)
    save(2, 2.0, 1)
    (root / "iter_0000002" / "common.pt").write_bytes(b"torn")
    with Recorder(disk) as recorder:
        save(2, 22.0, 1)
        recorder.mark(2)
    for state, after in started(recorder.states(), tmp_path):
        assert next_start(after) >= max([1, *recorder.promised(state)])
    assert sorted(path.name for path in root.iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        LATEST_FILE,
    ]


@pytest.mark.parametrize("ending", [".removed", ".superseded", ".incomplete"])
def test_the_latest_gets_its_name_back(disk: Path, save: Save, ending: str):
    """A run that was killed between two renames left it under another name."""
    root = disk / "runs" / "a"
    save(3, 3.0, 0)
    iteration_folder(root, 3).rename(root / f"iter_0000003{ending}")
    assert next_start(root) == 3


def test_a_state_that_is_saved_is_not_saved_again(disk: Path, save: Save, pg_collection):
    root = disk / "runs" / "a"
    save(3, 3.0, 0)
    before = (root / "iter_0000003" / MANIFEST_FILE).stat().st_mtime_ns
    save(3, float("nan"), 3)  # its run gives up, and its memory is spoiled by now
    assert (root / "iter_0000003" / MANIFEST_FILE).stat().st_mtime_ns == before
    assert len(list(root.iterdir())) == 2


def test_nothing_is_removed_in_a_streak_of_skipped_steps(disk: Path, save: Save):
    root = disk / "runs" / "a"
    for iteration in range(1, 5):
        save(iteration, 1.0, iteration - 1, skipped=max(iteration - 2, 0))
    names = [f"iter_000000{n}" for n in range(1, 5)]
    assert sorted(path.name for path in root.iterdir()) == [*names, LATEST_FILE]
    save(5, 1.0, 4)
    assert sorted(path.name for path in root.iterdir()) == [
        "iter_0000004",
        "iter_0000005",
        LATEST_FILE,
    ]


def test_values_that_are_not_finite_get_no_name(disk: Path, save: Save):
    from megatron_croc.errors import CheckpointError

    root = disk / "runs" / "a"
    save(3, 3.0, 0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=r"rank 0: weight is not finite"):
            save(4, value, 3)
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000003", LATEST_FILE]
