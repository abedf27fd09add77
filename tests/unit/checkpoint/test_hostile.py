"""Files of every kind in a checkpoint that try to run code; none of it runs.

An attacker who can write a checkpoint can also write its digests, so every file gets a fitting
manifest.
"""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_croc.checkpoint.manifest import MANIFEST_FILE, write_manifest
from megatron_croc.errors import CheckpointError, CrocError
from tests.support.synthetic import tiny_run


class Hostile:
    """Object that creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path):
    path = tmp_path / "trace"
    yield path
    assert not path.exists()


@pytest.fixture
def saved(pg_collection, tmp_path: Path) -> Path:
    """A checkpoint of a tiny model."""
    from megatron_croc.training.build import build_training_state
    from tests.support.checkpoints import save_checkpoint

    root = tmp_path / "checkpoints"
    training = build_training_state(
        tiny_run("finetune", save=str(root)), pg_collection, train_iters=10
    )
    training.state.iteration = 3
    return save_checkpoint(
        training.run, training.state, training.chunks, training.optimizer, pg_collection
    )


def sign(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder)


def refused(folder: Path, pg_collection) -> set[str]:
    """Messages when a run resumes or starts from the checkpoint, and when it is converted."""
    from megatron_croc.convert.exporting import export_huggingface
    from megatron_croc.training.build import build_training_state

    messages = set()
    for name in ("load", "pretrained_checkpoint"):
        run = tiny_run("finetune", **{name: str(folder.parent)})
        with pytest.raises(CrocError) as error:
            build_training_state(run, pg_collection, train_iters=10)
        messages.add(str(error.value))
    with pytest.raises(CrocError) as error:
        export_huggingface(folder, folder.parent / "out")
    messages.add(str(error.value))
    assert all(len(message.splitlines()) == 1 for message in messages)
    return messages


def test_an_index(saved: Path, pg_collection, trace: Path):
    (saved / ".metadata").write_bytes(pickle.dumps(Hostile(trace)))
    sign(saved)
    (message,) = refused(saved, pg_collection)
    assert ".metadata: damaged" in message and "pathlib.Path.touch does not belong there" in message


def test_an_index_with_code_deep_inside(saved: Path, pg_collection, trace: Path):
    """All tensors are present, and torch's own loading works."""
    index = dcp.FileSystemReader(saved).read_metadata()
    index.planner_data = Hostile(trace)
    (saved / ".metadata").write_bytes(pickle.dumps(index))
    sign(saved)
    (message,) = refused(saved, pg_collection)
    assert "pathlib.Path.touch does not belong there" in message


def test_an_index_that_points_elsewhere(saved: Path, pg_collection):
    index = dcp.FileSystemReader(saved).read_metadata()
    next(iter(index.storage_data.values())).relative_path = "../../elsewhere"
    (saved / ".metadata").write_bytes(pickle.dumps(index))
    sign(saved)
    (message,) = refused(saved, pg_collection)
    assert "'../../elsewhere', which is not in its folder" in message


def test_common_state(saved: Path, pg_collection, trace: Path):
    """common.pt is read by a run that resumes or starts, never by a conversion."""
    from megatron_croc.training.build import build_training_state

    torch.save({"optimizer": Hostile(trace)}, saved / "common.pt")
    sign(saved)
    for name in ("load", "pretrained_checkpoint"):
        run = tiny_run("finetune", **{name: str(saved.parent)})
        with pytest.raises(CheckpointError, match=r"common\.pt: damaged.*could run code"):
            build_training_state(run, pg_collection, train_iters=10)


def rewrite_weights(folder: Path, hostile: Hostile, *, tensors: bool) -> int:
    """Put code in place of the objects (or tensors); return the number replaced."""
    index = dcp.FileSystemReader(folder).read_metadata()
    objects = {k for k, v in index.state_dict_metadata.items() if not hasattr(v, "chunks")}
    count = 0
    for key, place in index.storage_data.items():
        if (key.fqn in objects) == tensors:
            continue
        file = folder / f"hostile{count}.distcp"
        torch.save(hostile, file)
        place.relative_path, place.offset, place.length = file.name, 0, file.stat().st_size
        count += 1
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    sign(folder)
    return count


def test_stored_objects_are_never_opened(saved: Path, pg_collection, trace: Path):
    from megatron_croc.training.build import build_training_state

    assert rewrite_weights(saved, Hostile(trace), tensors=False) > 5
    for name in ("load", "pretrained_checkpoint"):
        run = tiny_run("finetune", **{name: str(saved.parent)})
        build_training_state(run, pg_collection, train_iters=10)


def test_tensors(saved: Path, pg_collection, trace: Path):
    assert rewrite_weights(saved, Hostile(trace), tensors=True) > 5
    assert all("cannot be read" in message for message in refused(saved, pg_collection))


def test_settings_and_state_are_plain_text(saved: Path, trace: Path):
    from megatron_croc.checkpoint.state import STATE_FILE, TrainState
    from megatron_croc.convert.exporting import read_run

    (saved / "run.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{trace}]\n")
    with pytest.raises(CrocError, match=r"run\.yaml"):
        read_run(saved)
    (saved / STATE_FILE).write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(CheckpointError, match=r"train_state\.json"):
        TrainState.load(saved)


def test_these_files_do_run_code_where_they_are_trusted(saved: Path, tmp_path: Path):
    """Check that the files would run code if they were loaded without care."""
    traces = [tmp_path / "index", tmp_path / "object"]
    (saved / ".metadata").write_bytes(pickle.dumps(Hostile(traces[0])))
    with pytest.raises(Exception):  # noqa: B017  what it made is no index
        dcp.FileSystemReader(saved).read_metadata()
    torch.save(Hostile(traces[1]), tmp_path / "object.pt")
    torch.load(tmp_path / "object.pt", weights_only=False)
    assert all(path.exists() for path in traces)
