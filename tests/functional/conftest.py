"""Data for the tests of several commands."""

from pathlib import Path

import pytest

from megatron_croc.data.demo.small import write_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The demo data set as shards, one folder per stage."""
    names = ("pretrain_mlp", "pretrain_croc", "finetune", "valid_pretrain_croc")
    return write_demo(tmp_path_factory.mktemp("demo"), names)
