"""The run that a folder belongs to, and where a run resumes from."""

import re
from pathlib import Path

import pytest

from megatron_croc.checkpoint.manifest import write_manifest
from megatron_croc.checkpoint.retention import superfluous
from megatron_croc.checkpoint.run_folder import (
    RUN_ID_FILE,
    begin_run,
    own_checkpoints,
    read_run_id,
    read_state,
    refuse_other_run,
    resume_root,
)
from megatron_croc.checkpoint.state import LATEST_FILE, TrainState, iteration_folder
from megatron_croc.config.base import to_yaml
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import CheckpointError
from tests.support.synthetic import tiny_run


def checkpoint(run: RunConfig, iteration: int, run_id: str = "") -> Path:
    """Make the latest checkpoint of a run in `save`, without weights."""
    assert run.checkpoint.save is not None
    root = Path(run.checkpoint.save)
    folder = iteration_folder(root, iteration)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(to_yaml(run))
    TrainState(iteration=iteration, stage=run.stage, run_id=run_id).save(folder)
    write_manifest(folder)
    (root / LATEST_FILE).write_text(f"{iteration}\n")
    return folder


def begin(run: RunConfig, state: TrainState) -> list[Path]:
    assert run.checkpoint.save is not None
    return begin_run(run.checkpoint, [Path(run.checkpoint.save)], state, to_yaml(run))


def test_the_folder_to_resume_from(tmp_path: Path):
    save, other = str(tmp_path / "save"), str(tmp_path / "other")
    run = tiny_run(save=save)
    assert resume_root(run.checkpoint) is None
    assert resume_root(tiny_run(save=save, load=other).checkpoint) == other
    older = checkpoint(run, 2)
    checkpoint(run, 4)
    for load in (None, save, other):  # a branch that was started again goes on in its own folder
        assert resume_root(tiny_run(save=save, load=load).checkpoint) == save
    assert resume_root(tiny_run(save=save, load=str(older)).checkpoint) == str(older)
    assert resume_root(tiny_run(load=other).checkpoint) == other


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 128}, "hidden_size 64 there, 128 here"),
        ({"seed": 7}, "seed 1234 there, 7 here"),
        (
            {"hidden_size": 128, "num_layers": 3, "pool_size": 8, "replace_ratio": 0.5, "seed": 7},
            "and 2 more",
        ),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path: Path, changes, told):
    save = str(tmp_path)
    checkpoint(tiny_run(save=save), 2)
    with pytest.raises(CheckpointError) as error:
        refuse_other_run(tiny_run(save=save, **changes))
    message = str(error.value)
    assert told in message and "save to another folder" in message and "\n" not in message
    refuse_other_run(tiny_run(save=save, load=save, **changes))  # the way out that it names
    assert f"--load {save}" in message


def test_another_stage_is_refused_with_the_way_to_its_weights(tmp_path: Path):
    save = str(tmp_path)
    checkpoint(tiny_run("pretrain_croc", save=save), 2)
    with pytest.raises(CheckpointError, match=r"stage pretrain_croc, this run is finetune.*") as e:
        refuse_other_run(tiny_run("finetune", save=save))
    assert f"--pretrained-checkpoint {save}" in str(e.value)


def test_what_does_not_make_another_run(tmp_path: Path):
    save = str(tmp_path)
    refuse_other_run(tiny_run(save=save))  # empty
    folder = checkpoint(tiny_run(save=save), 2)
    for changes in (
        {},
        {"lr": 0.5, "train_iters": 99, "tensor_model_parallel_size": 2, "save_interval": 7},
        {"attention_backend": "dense", "assign_backend": "scipy", "overlap_assignment": False},
    ):
        refuse_other_run(tiny_run(save=save, **changes))
    (folder / "run.yaml").write_text("][")  # its damage is found later, with the digests
    refuse_other_run(tiny_run(save=save, seed=7))


def test_a_new_run_gets_an_id_and_keeps_it(tmp_path: Path):
    run = tiny_run(save=str(tmp_path / "save"))
    root = tmp_path / "save"
    state = TrainState()
    assert begin(run, state) == [root]  # whatever metrics lie there are not its own
    assert re.fullmatch(r"[0-9a-f]{12}", state.run_id)
    assert read_run_id(root) == state.run_id
    assert (root / "run.yaml").read_text() == to_yaml(run)
    again = tiny_run(save=str(root), load=str(root))
    resumed = TrainState(iteration=4, run_id=state.run_id)
    assert begin(again, resumed) == []
    assert resumed.run_id == state.run_id
    # A branch into another folder is another run, and so is a new start here.
    branch = tiny_run(save=str(tmp_path / "branch"), load=str(root))
    branched = TrainState(iteration=4, run_id=state.run_id)
    assert begin(branch, branched) == [tmp_path / "branch"]
    assert branched.run_id not in ("", state.run_id)
    fresh = TrainState()
    assert begin(run, fresh) == [root] and fresh.run_id != state.run_id


def test_a_run_from_before_there_were_ids_goes_on(tmp_path: Path):
    run = tiny_run(save=str(tmp_path), load=str(tmp_path))
    state = TrainState(iteration=4)
    assert begin(run, state) == []
    assert state.run_id and read_run_id(tmp_path) == state.run_id
    # A start that was killed before its first save has given the folder its id already.
    again = TrainState(iteration=4)
    begin(run, again)
    assert again.run_id == state.run_id


def test_changed_settings_are_kept_beside(tmp_path: Path):
    def settings_of(name: str) -> str:
        return (tmp_path / name).read_text()

    def resume(**changes: float) -> None:
        run = tiny_run(save=str(tmp_path), load=str(tmp_path), **changes)  # type: ignore[arg-type]
        begin(run, TrainState(iteration=4, run_id="a"))

    resume()
    first = settings_of("run.yaml")
    resume()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml", RUN_ID_FILE]
    resume(lr=0.5)
    resume(lr=0.25)  # the one with 0.5 has made no checkpoint
    assert settings_of("run_0000004.yaml") == first
    assert "lr: 0.25" in settings_of("run.yaml")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    run = tiny_run(save=str(tmp_path / "file" / "save"))
    with pytest.raises(CheckpointError, match=r"file/save cannot be written \(Not a directory\)"):
        begin(run, TrainState())


def test_checkpoints_of_another_run_are_passed_over(tmp_path: Path):
    run = tiny_run(save=str(tmp_path))
    old, foreign = checkpoint(run, 1), checkpoint(run, 2, "aaaa")
    own = [checkpoint(run, iteration, "bbbb") for iteration in (3, 4)]
    taken, lines = own_checkpoints(tmp_path)
    assert taken == [own[1], own[0], old]  # one without an id belongs to the folder
    assert lines == [f"{foreign} is of another run (aaaa, not bbbb)"]
    # run_id.txt says whose the folder is, also against the latest.
    (tmp_path / RUN_ID_FILE).write_text("aaaa\n")
    taken, lines = own_checkpoints(tmp_path)
    assert taken == [foreign, old] and len(lines) == 2
    assert own_checkpoints(own[0]) == ([own[0]], [])  # asked for by name


def test_checkpoints_of_another_run_are_never_removed(tmp_path: Path):
    run = tiny_run(save=str(tmp_path))
    checkpoint(run, 1, "aaaa")
    own = [checkpoint(run, iteration, "bbbb") for iteration in (2, 3, 4)]
    assert superfluous(own[-1], keep_last=1, keep_every=None) == own[:-1]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[]", b""])
def test_a_state_that_cannot_be_read_has_no_id(tmp_path: Path, content: bytes):
    (tmp_path / "train_state.json").write_bytes(content)
    assert read_state(tmp_path) == {}
