"""Messages to a process before it computes."""

import os
import subprocess
import sys

import pytest
from megatron.core import parallel_state

from megatron_croc.parallel.megatron_versions import TESTED, name_untested_megatron


def test_float32_products_are_float32_although_the_image_allows_tf32():
    code = (
        "import torch; from megatron_croc.config.parallel import ParallelConfig;"
        "from megatron_croc.parallel.groups import start_torch;"
        "assert torch.get_float32_matmul_precision() == 'high';"
        "start_torch(ParallelConfig());"
        "assert torch.get_float32_matmul_precision() == 'highest';"
        "assert not torch.backends.cuda.matmul.allow_tf32;"
        "assert not torch.backends.cudnn.allow_tf32"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "WORLD_SIZE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.fixture
def said(monkeypatch):
    """Logged lines, once each."""
    from megatron_croc import log
    from megatron_croc.parallel import megatron_versions

    lines: list[str] = []
    monkeypatch.setattr(log, "_logged_once", set())
    monkeypatch.setattr(
        megatron_versions.logger,
        "log",
        lambda _, message, *args, **__: lines.append(message % args),
    )
    return lines


@pytest.mark.parametrize("version", [*TESTED, "0.19.2+4f1c2ab"])
def test_a_tried_megatron_is_not_spoken_of(version, said):
    name_untested_megatron(version)
    assert said == []


def test_another_megatron_is_named_once_with_what_is_assumed_of_it(said):
    for _ in range(2):
        name_untested_megatron("0.23.0")
    (line,) = said
    assert "megatron-core 0.23.0 is not tested (0.16.1, 0.19.2 are)" in line
    assert "token count is not divided again" in line


def test_the_start_of_a_run_names_it(monkeypatch):
    from megatron_croc.config.parallel import ParallelConfig
    from megatron_croc.parallel import groups

    named = []
    monkeypatch.setattr(groups, "name_untested_megatron", lambda: named.append(True))
    groups.start_distributed(ParallelConfig(), seed=1)
    groups.stop_distributed()
    assert named == [True]


def test_no_gloo_groups_are_made_beside_those_of_the_device(pg_collection):
    made = {n: g for n, g in vars(parallel_state).items() if "GLOO" in n and g is not None}
    assert not made
