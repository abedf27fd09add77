"""A run's folder is held inside the block, and free behind it, whatever ends the block."""

from pathlib import Path

import pytest

from megatron_croc.checkpoint.folder_lock import FolderLock
from megatron_croc.checkpoint.ownership import open_run_folder
from megatron_croc.errors import CheckpointError
from megatron_croc.recipes import get_recipe


def test_the_folder_is_free_behind_the_block(pg_collection, tmp_path: Path):
    run = get_recipe("tiny/finetune")
    run.checkpoint.save = str(tmp_path / "run")
    with open_run_folder(run) as resumed_from:
        assert resumed_from is None
        with pytest.raises(CheckpointError):
            FolderLock(tmp_path / "run")
    FolderLock(tmp_path / "run").release()
    with pytest.raises(ZeroDivisionError), open_run_folder(run):
        raise ZeroDivisionError
    FolderLock(tmp_path / "run").release()
