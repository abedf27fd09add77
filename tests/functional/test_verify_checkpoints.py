"""`croc checkpoint verify`, as a user calls it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_croc.checkpoint.manifest import INDEX_FILE, MANIFEST_FILE, write_manifest
from megatron_croc.checkpoint.state import LATEST_FILE, TrainState, iteration_folder
from megatron_croc.cli.checkpoint import verify as main

Verify = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def verify(capsys) -> Verify:
    """Exit status and printed lines."""

    def run(*words: object) -> tuple[int, list[str]]:
        status = main([*map(str, words)])
        return status, "".join(capsys.readouterr()).splitlines()

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for iteration in (100, 200, 300):
        folder = iteration_folder(tmp_path, iteration)
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(bytes(iteration))
        (folder / INDEX_FILE).write_bytes(b"")
        state = TrainState(iteration=iteration, consumed_samples=8 * iteration, stage="finetune")
        state.save(folder)
        write_manifest(folder)
    (tmp_path / LATEST_FILE).write_text("300\n")
    return tmp_path


def test_whole_ones_and_what_a_run_takes(verify: Verify, root: Path) -> None:
    (root / "iter_0000400.incomplete").mkdir()
    assert verify(root) == (
        0,
        [
            "iter_0000300: whole, finetune, 2,400 samples, 0.00 GiB",
            "iter_0000200: whole, finetune, 1,600 samples, 0.00 GiB",
            "iter_0000100: whole, finetune, 800 samples, 0.00 GiB",
            "iter_0000400.incomplete: being written or removed, or left by a killed run",
            f"a run goes on from {root}/iter_0000300",
        ],
    )
    assert len(verify(root, "--newest", 1)[1]) == 3
    assert verify(root / "iter_0000200")[1][-1] == f"a run goes on from {root}/iter_0000200"


def test_damage_is_named_and_the_one_before_is_taken(verify: Verify, root: Path) -> None:
    weights = root / "iter_0000300" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (root / "iter_0000200" / MANIFEST_FILE).unlink()
    status, lines = verify(root)
    assert status == 1
    assert lines[0] == (
        "iter_0000300: DAMAGED, __0_0.distcp is not what was written (in bytes 0..300)"
    )
    assert lines[1].startswith("iter_0000200: DAMAGED, manifest.json is missing")
    assert lines[-1] == f"a run goes on from {root}/iter_0000100"
    shutil.rmtree(root / "iter_0000100")
    assert verify(root)[1][-1] == "none of these is whole"


def test_a_state_that_nobody_can_read_is_damage(verify: Verify, root: Path) -> None:
    folder = root / "iter_0000300"
    (folder / "train_state.json").write_text("[]")
    write_manifest(folder)  # its digests fit
    status, lines = verify(root, "--newest", 1)
    assert status == 1
    assert "train_state.json: not readable as a training state" in lines[0]


def test_an_empty_folder(verify: Verify, tmp_path: Path) -> None:
    assert verify(tmp_path) == (1, [f"{tmp_path}: no checkpoint there"])
