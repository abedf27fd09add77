import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest

from megatron_croc.cli.check import ATTENTION_BACKENDS, count_samples, main
from megatron_croc.config.model import AttentionBackend
from megatron_croc.data.store.shard_writer import FORMAT_NAME, FORMAT_VERSION, ShardInfo, shard_name
from megatron_croc.recipes import list_recipes

COMMAND = [sys.executable, "-m", "megatron_croc", "check"]


def check(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60)


def test_the_command_reports_quickly():
    start = time.monotonic()
    done = check("--recipe", "croc_7b/pretrain_croc", "--world-size", "8")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10  # 0.2 s on an idle machine
    for line in (
        "  processes                           8 = TP 2 x PP 1 x CP 1 x DP 4",
        "  samples of one step                 128 = micro-batch 2 x DP 4 x 16 micro-batches",
        "  visual tokens of one image          576, 432 of them replaced",
        "  language_model                        6,738,415,616  trained",
        "  vision_tower                            290,909,184  frozen",
        "  tensor_model_parallel_size          2",
    ):
        assert line in done.stdout.splitlines()
    assert "made for 4096 positions" in done.stderr


def test_neither_torch_nor_megatron_is_imported():
    code = (
        "import sys; from megatron_croc.cli.check import main; "
        "main(['--recipe', 'tiny/pretrain_croc', '--world-size', '1']); "
        "bad = sorted({'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules)); "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_faults_at_once_and_exit_status_1():
    done = check("--recipe", "tiny/pretrain_croc", "--tensor-model-parallel-size", "3", "--lr", "0")
    assert done.returncode == 1
    assert done.stdout == ""
    faults = done.stderr.splitlines()
    assert any(line.startswith("world_size=8") for line in faults)
    assert any(line.startswith("lr=0.0") for line in faults)
    assert sum(line.startswith("tensor_model_parallel_size=3") for line in faults) >= 3


def test_faults_of_recipe_file_and_flags_come_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "mine.yaml"
    config.write_text("training: {seeed: 1}\n")
    assert main(["--recipe", "tinny/finetune", "--config", str(config), "--lrr", "1"]) == 1
    errors = capsys.readouterr().err
    assert "did you mean tiny/finetune?" in errors
    assert "did you mean training.seed?" in errors
    assert "did you mean --lr?" in errors


def test_no_recipe_names_them(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 1
    assert "--recipe is not given; there are tiny/pretrain_mlp" in capsys.readouterr().err


def test_flags_beat_the_file_which_beats_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "mine.yaml"
    config.write_text("optimizer: {lr: 5e-3}\ntraining: {seed: 7}\n")
    words = ["--recipe", "tiny/finetune", "--config", str(config), "optimizer.lr=6e-3", "--dump"]
    assert main(words) == 0
    dumped = capsys.readouterr().out
    assert "  lr: 0.006\n" in dumped
    assert "  seed: 7\n" in dumped
    assert "  global_batch_size: 32\n" in dumped
    config.write_text(dumped)  # a dump is a complete run
    assert main(["--config", str(config), "--dump"]) == 0
    assert capsys.readouterr().out == dumped


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_can_be_reported(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--recipe", name]) == 0
    assert "memory of one rank" in capsys.readouterr().out


def test_help_shows_every_section(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "\nmodel.language_model:\n" in shown
    assert "  --bf16, --no-bf16  [true or false; default true]\n" in shown
    assert "--world-size" in shown


def test_training_inputs_are_required_on_request(capsys: pytest.CaptureFixture[str]):
    assert main(["--recipe", "tiny/finetune", "--for-training"]) == 1
    assert "data_path is not given" in capsys.readouterr().err


def _shard(samples: int) -> dict:
    info = ShardInfo(
        name=shard_name(0),
        tar=f"{shard_name(0)}.tar",
        text_format="json",
        num_samples=samples,
        num_images=0,
        num_text_only=samples,
        tar_bytes=0,
        tar_sha256="",
        idx_bytes=0,
        idx_sha256="",
    )
    return asdict(info)


def test_steps_are_derived_from_the_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, samples in {"a": 1000, "b": 600}.items():
        (tmp_path / name).mkdir()
        manifest = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "num_samples": samples,
            "num_images": 0,
            "num_text_only": samples,
            "shards": [_shard(samples)],
        }
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert count_samples(folders) == 1600
    assert main(["--recipe", "tiny/finetune", "--train-epochs", "2", "--data-path", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  samples of the run                  3,200 (2 epochs)" in lines
    assert "  steps                               100, 3 of warm-up" in lines
    (tmp_path / "blend.yaml").write_text("- {path: a, epochs: 2}\n- {path: b, epochs: 0.5}\n")
    assert count_samples([str(tmp_path / "blend.yaml")]) == 2300
    assert main(["--recipe", "tiny/finetune", "--packing", "--data-path", *folders]) == 0
    assert "steps                               counted when" in capsys.readouterr().out
    (tmp_path / "b" / "manifest.json").write_text("{}")
    assert count_samples(folders) is None
    assert count_samples([]) is None


def test_every_attention_backend_is_listed_and_the_chosen_one_marked(
    capsys: pytest.CaptureFixture[str],
):
    assert ["auto", *ATTENTION_BACKENDS] == list(get_args(AttentionBackend))
    words = ["--recipe", "tiny/pretrain_croc", "--world-size", "1", "--attention-backend", "flip"]
    assert main(words) == 0
    lines = capsys.readouterr().out.split("attention backends\n")[1].splitlines()
    starts = [line.split()[0] for line in lines]
    assert starts[:4] == ["auto", "flip", "flex", "dense"]
    assert lines[1].startswith("  flip (chosen) ") and "(chosen)" not in lines[0]
    assert sum(line.endswith(("  installed", "not installed")) for line in lines) == 2


def test_an_unknown_attention_backend_is_refused_with_the_choices(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["--recipe", "tiny/pretrain_croc", "--attention-backend", "fast"]) == 1
    message = capsys.readouterr().err
    assert "fast" in message and "flip" in message and "dense" in message
