"""Choice of the checkpoint to load, and the messages when there is none."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_croc.checkpoint.manifest import MANIFEST_FILE, find_damage, write_manifest
from megatron_croc.checkpoint.retention import being_read
from megatron_croc.checkpoint.state import (
    LATEST_FILE,
    STATE_FILE,
    TrainState,
    iteration_folder,
    latest_checkpoint,
)
from megatron_croc.errors import CheckpointError
from tests.support.synthetic import tiny_run


def make_checkpoint(root: Path, iteration: int) -> Path:
    """Make a folder with the state of a checkpoint, without weights."""
    folder = iteration_folder(root, iteration)
    folder.mkdir(parents=True)
    TrainState(iteration=iteration, consumed_samples=8 * iteration, stage="finetune").save(folder)
    return folder


def test_the_tracker_decides(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    folders = {n: make_checkpoint(tmp_path, n) for n in (100, 2000)}
    assert folders[100].name == "iter_0000100"  # as Megatron-LM names it
    assert latest_checkpoint(tmp_path) is None  # nothing was published
    (tmp_path / LATEST_FILE).write_text("100\n")
    assert latest_checkpoint(str(tmp_path)) == folders[100]
    (tmp_path / LATEST_FILE).write_text("2000")
    assert latest_checkpoint(tmp_path) == folders[2000]


def test_a_checkpoint_may_be_named_itself(tmp_path: Path):
    folder = make_checkpoint(tmp_path, 7)
    (tmp_path / LATEST_FILE).write_text("9\n")
    assert latest_checkpoint(folder) == folder
    other = tmp_path / "release"
    shutil.copytree(folder, other)
    (tmp_path / LATEST_FILE).write_text("release\n")
    assert latest_checkpoint(tmp_path) == other


def test_a_tracker_that_names_a_missing_folder_is_an_error(tmp_path: Path):
    (tmp_path / LATEST_FILE).write_text("100\n")
    with pytest.raises(CheckpointError, match=r"names iter_0000100, which is not a complete"):
        latest_checkpoint(tmp_path)
    iteration_folder(tmp_path, 100).mkdir()  # half copied: weights without the state
    with pytest.raises(CheckpointError, match="iter_0000100"):
        latest_checkpoint(tmp_path)


def test_the_state_comes_back(tmp_path: Path):
    folder = make_checkpoint(tmp_path, 5)
    state = TrainState.load(folder)
    assert (state.iteration, state.consumed_samples, state.stage) == (5, 40, "finetune")


@pytest.mark.parametrize("content", ["{", "[]", '{"iteration": 1, "surprise": 2}', None])
def test_an_unreadable_state_is_named(tmp_path: Path, content):
    folder = make_checkpoint(tmp_path, 5)
    if content is None:
        (folder / STATE_FILE).unlink()
    else:
        (folder / STATE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"iter_0000005.*train_state\.json.*--load"):
        TrainState.load(folder)


# Below: real checkpoints of a tiny model, written and read in this process.


def trainer_of(run, pg_collection):
    from megatron_croc.training.build import build_training_state

    return build_training_state(run, pg_collection, train_iters=10)


def save(training, pg_collection, iteration: int) -> Path:
    from tests.support.checkpoints import save_checkpoint

    training.state.iteration = iteration
    training.state.consumed_samples = 8 * iteration
    return save_checkpoint(
        training.run, training.state, training.chunks, training.optimizer, pg_collection
    )


def shift_weights(training) -> None:
    with torch.no_grad():
        for parameter in training.chunks[0].module.parameters():
            parameter.add_(0.5)
    training.optimizer.reload_model_params()


def first_weight(training) -> float:
    return training.chunks[0].module.projector.encoder.linear_fc1.weight.flatten()[0].item()


@pytest.fixture
def saved(pg_collection, tmp_path: Path):
    """A run with one checkpoint, at iteration 3."""
    root = tmp_path / "checkpoints"
    run = tiny_run("finetune", save=str(root), load=str(root))
    training = trainer_of(run, pg_collection)
    save(training, pg_collection, 3)
    return training, root


def test_what_a_save_leaves_behind(saved):
    _, root = saved
    assert sorted(os.listdir(root)) == ["iter_0000003", LATEST_FILE]
    assert find_damage(root / "iter_0000003") == []
    assert (root / LATEST_FILE).read_text() == "3\n"
    folder = root / "iter_0000003"
    assert json.loads((folder / STATE_FILE).read_text())["stage"] == "finetune"
    assert "finetune" in (folder / "run.yaml").read_text()
    assert (folder / "metadata.json").exists()  # torch_dist, as Megatron reads it


def test_another_stage_is_refused_with_the_way_out(saved, pg_collection):
    _, root = saved
    with pytest.raises(CheckpointError) as error:
        trainer_of(tiny_run("pretrain_croc", load=str(root)), pg_collection)
    message = str(error.value)
    assert "iter_0000003" in message and "finetune" in message and "pretrain_croc" in message
    assert f"--pretrained-checkpoint {root}" in message


def test_another_architecture_is_refused_by_key_and_both_shapes(saved, pg_collection):
    _, root = saved
    for name in ("load", "pretrained_checkpoint"):
        run = tiny_run("finetune", hidden_size=128, **{name: str(root)})
        with pytest.raises(CheckpointError) as error:
            trainer_of(run, pg_collection)
        message = str(error.value)
        assert "another architecture" in message and "run.yaml" in message
        key = "language_model.decoder.final_layernorm.weight"
        assert f"{key}: (64,) there, (128,) needed" in message
        assert "... and " in message and len(message.splitlines()) < 10


def test_nothing_to_resume_from_starts_fresh(pg_collection, tmp_path: Path):
    run = tiny_run("finetune", load=str(tmp_path / "empty"))
    assert trainer_of(run, pg_collection).state.iteration == 0


def test_a_folder_without_a_checkpoint_is_not_the_stage_before(pg_collection, tmp_path: Path):
    run = tiny_run("finetune", pretrained_checkpoint=str(tmp_path))
    with pytest.raises(
        CheckpointError, match=rf"--pretrained-checkpoint {tmp_path}: no checkpoint"
    ):
        trainer_of(run, pg_collection)


@pytest.mark.parametrize("name", ["load", "pretrained_checkpoint"])
@pytest.mark.parametrize(
    "damage", ["no weights", "unlisted", "no metadata", "torn", "lost file", "flipped"]
)
def test_a_damaged_checkpoint_is_named(saved, pg_collection, name, damage):
    """Damage is found with the digests; without them, all but a flipped bit."""
    _, root = saved
    folder = root / "iter_0000003"
    (shard,) = folder.glob("*.distcp")
    if damage == "no weights":
        for path in folder.iterdir():
            if path.name not in (STATE_FILE, MANIFEST_FILE):
                path.unlink()
    elif damage == "unlisted":  # lost before the manifest was written
        shard.rename(folder / "__7_0.distcp")
        write_manifest(folder)
    elif damage == "no metadata":
        (folder / ".metadata").unlink()
    elif damage == "torn":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    for verify in (True, False):
        run = tiny_run("finetune", verify_checkpoint=verify, **{name: str(root)})
        if damage == "flipped" and not verify:
            continue
        with pytest.raises(CheckpointError, match="iter_0000003") as error:
            trainer_of(run, pg_collection)
        message = str(error.value)
        assert len(message.splitlines()) == 1
        assert ("is damaged: " in message and "--no-verify-checkpoint" in message) == verify


def test_a_checkpoint_without_digests_is_not_taken_unasked(saved, pg_collection):
    _, root = saved
    (root / "iter_0000003" / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing.*never finished"):
        trainer_of(tiny_run("finetune", load=str(root)), pg_collection)
    run = tiny_run("finetune", load=str(root), verify_checkpoint=False)
    assert trainer_of(run, pg_collection).state.iteration == 3


def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, pg_collection, caplog):
    training, root = saved
    before = first_weight(training)
    shift_weights(training)
    for iteration in (4, 5):
        save(training, pg_collection, iteration)
    (root / "iter_0000005" / ".metadata").write_bytes(b"")
    (root / "iter_0000004" / "run.yaml").unlink()
    run = tiny_run("finetune", load=str(root))
    with caplog.at_level("WARNING", logger="megatron_croc"):
        resumed = trainer_of(run, pg_collection)
    assert resumed.state.iteration == 3 and first_weight(resumed) == before
    (line,) = {r.getMessage() for r in caplog.records if " is damaged: " in r.getMessage()}
    for word in (
        "5 is damaged: .metadata has 0 bytes",
        "run.yaml is missing",
        "iter_0000003 instead",
    ):
        assert word in line
    # Strictly, or for a start from its weights, no other is taken.
    for changes in (
        dict(load=str(root), strict_resume=True),
        dict(pretrained_checkpoint=str(root)),
    ):
        with pytest.raises(CheckpointError, match="iter_0000005 is damaged"):
            trainer_of(tiny_run("finetune", **changes), pg_collection)
    (root / "iter_0000003" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"0000005 is .*0000004 is .*0000003 is .*no other"):
        trainer_of(run, pg_collection)


def test_a_run_killed_before_its_first_tracker_is_resumed(saved, pg_collection):
    _, root = saved
    (root / LATEST_FILE).unlink()
    assert trainer_of(tiny_run("finetune", load=str(root)), pg_collection).state.iteration == 3


def test_a_tracker_ahead_of_its_checkpoint_falls_back(saved, pg_collection):
    _, root = saved
    (root / LATEST_FILE).write_text("9\n")
    assert trainer_of(tiny_run("finetune", load=str(root)), pg_collection).state.iteration == 3


def test_retention_through_saves(saved, pg_collection):
    training, root = saved
    training.run.checkpoint.keep_last = 2
    training.run.checkpoint.keep_every = 4
    for iteration in (4, 5, 6):
        save(training, pg_collection, iteration)
    names = ["iter_0000004", "iter_0000005", "iter_0000006", LATEST_FILE]
    assert sorted(os.listdir(root)) == names
    # One that somebody reads stays until nobody does.
    with being_read(root / "iter_0000005"):
        save(training, pg_collection, 7)
        assert (root / "iter_0000005" / MANIFEST_FILE).exists()
    save(training, pg_collection, 8)
    names = ["iter_0000004", "iter_0000007", "iter_0000008", LATEST_FILE]
    assert sorted(os.listdir(root)) == names
    assert trainer_of(training.run, pg_collection).state.iteration == 8


def test_the_same_iteration_can_be_saved_again_by_another_run(saved, pg_collection):
    training, root = saved
    before = first_weight(training)
    shift_weights(training)
    save(training, pg_collection, 3)
    kept = root / "iter_0000003.superseded"
    assert sorted(os.listdir(root)) == ["iter_0000003", kept.name, LATEST_FILE]
    assert find_damage(kept) == []
    training.run.checkpoint.load = str(kept)
    assert first_weight(trainer_of(training.run, pg_collection)) == before
    training.run.checkpoint.load = str(root)
    assert first_weight(trainer_of(training.run, pg_collection)) == first_weight(training)
