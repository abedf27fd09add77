import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest

from megatron_croc.cli.check import ATTENTION_BACKENDS, count_samples, main
from megatron_croc.config.model import AttentionBackend
from megatron_croc.data.store.shard_writer import (
    FORMAT_NAME,
    FORMAT_VERSION,
    ShardInfo,
    ShardWriter,
    shard_name,
    write_manifest,
)
from megatron_croc.recipes import list_recipes

COMMAND = [sys.executable, "-m", "megatron_croc", "check"]


def check(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60)


def test_the_command_reports_quickly():
    start = time.monotonic()
    done = check("--recipe", "croc_7b/pretrain_croc", "--world-size", "8", "--settings")
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


def test_settings_are_listed_only_on_request(capsys: pytest.CaptureFixture[str]):
    words = ["--recipe", "tiny/finetune", "--world-size", "1"]
    assert main(words) == 0
    brief = capsys.readouterr().out
    assert main([*words, "--settings"]) == 0
    full = capsys.readouterr().out
    assert brief.startswith("batch\n") and full.startswith("run\n") and full.endswith(brief)


README_EXAMPLE = (
    "--recipe croc_7b/pretrain_croc --world-size 16 --tensor-model-parallel-size 2 "
    "--sequence-parallel --micro-batch-size 4"
)


def verdict(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """Exit status, and the last two lines of the output."""
    status = main(line.split())
    expected, worst = capsys.readouterr().out.splitlines()[-2:]
    return status, expected, worst


def test_the_last_two_lines_are_the_verdict(capsys: pytest.CaptureFixture[str]):
    status, expected, worst = verdict(capsys, README_EXAMPLE)
    assert status == 0
    assert expected == (
        "fits on h100: needs 48.5 of 74.5 GiB (tensors 40.7, fragmentation 4.1, reserve 3.7) for "
        "samples of 774 tokens, the longest 1,520 (--text-tokens 200 --text-spread 0.5 --images 1)"
    )
    assert worst == (
        "worst case: does not fit on h100: needs 116.5 of 74.5 GiB (tensors 102.5, fragmentation "
        "10.3, reserve 3.7) with every sample of 8,192 tokens (seq_length)"
    )


def test_warnings_stand_before_the_verdict():
    command = [*COMMAND, *README_EXAMPLE.split()]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=buffered
    )
    warning, _, expected, worst = done.stdout.splitlines()[-4:]
    assert warning.startswith("warning: seq_length=8192")
    assert expected.startswith("fits on h100") and worst.startswith("worst case: ")


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ("--micro-batch-size 16", "--micro-batch-size 8"),
        ("--text-tokens 1000 --text-spread 1", "--micro-batch-size 2"),
        (
            "--tensor-model-parallel-size 1 --no-sequence-parallel --gpu a100-40",
            "--tensor-model-parallel-size 4 --sequence-parallel",
        ),
        (
            "--micro-batch-size 1 --text-tokens 8000 --gpu a100-40",
            "--recompute-granularity full",
        ),
    ],
)
def test_the_way_out_makes_it_fit(capsys: pytest.CaptureFixture[str], changes: str, flags: str):
    status, expected, _ = verdict(capsys, f"{README_EXAMPLE} {changes}")
    assert status == 1
    assert expected.startswith("does not fit on ") and expected.endswith(f"; it fits with {flags}")
    status, expected, _ = verdict(capsys, f"{README_EXAMPLE} {changes} {flags}")
    assert status == 0 and expected.startswith("fits on ")


def test_without_a_way_out_more_processes_are_asked_for(capsys: pytest.CaptureFixture[str]):
    line = "--recipe croc_13b/pretrain_croc --world-size 4 --gpu a100-40"
    status, expected, _ = verdict(capsys, line)
    assert status == 1
    assert expected.endswith("; no layout of 4 processes fits: take more, or another --gpu")


def test_the_gpu_decides(capsys: pytest.CaptureFixture[str]):
    line = f"{README_EXAMPLE} --micro-batch-size 16 --gpu"
    assert verdict(capsys, f"{line} h100")[0] == 1
    status, expected, _ = verdict(capsys, f"{line} h200")
    assert status == 0 and expected.startswith("fits on h200: needs 98.1 of 131.3 GiB")
    assert main([*line.split(), "h1000"]) == 1
    assert "choose from h100" in capsys.readouterr().err


def test_packs_are_full_whatever_the_samples(capsys: pytest.CaptureFixture[str]):
    line = f"{README_EXAMPLE} --packing --seq-length 4096 --text-tokens"
    short, long = (verdict(capsys, f"{line} {tokens} --images 0")[1] for tokens in (50, 500))
    assert "for full packs of 4,096 tokens, samples of 50 tokens" in short
    assert short.partition(" for ")[0] == long.partition(" for ")[0]


def test_samples_are_read_from_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "shards"
    folder.mkdir()
    with ShardWriter(folder, 0) as writer:
        for number in range(5):
            text = "x" * 400 * (number + 1)  # 100, 200, ... 500 tokens
            writer.add({"conversations": [{"from": "human", "value": text}]}, [])
    assert writer.info is not None
    write_manifest(folder, [writer.info])
    _, expected, _ = verdict(capsys, f"{README_EXAMPLE} --shards {folder}")
    assert f"samples of 300 tokens, the longest 625 (--shards {folder})" in expected
    assert main([*README_EXAMPLE.split(), "--shards", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_help_shows_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def default(*words: str) -> str:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        shown = capsys.readouterr().out
        return next(x for x in shown.splitlines() if x.startswith("  --global-batch-size"))

    assert default() == "  --global-batch-size  [an integer; default 128]"
    assert default("--recipe", "tiny/finetune").endswith("default 32]")
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: tiny/finetune\ntraining: {global_batch_size: 24}\n")
    assert default("--config", str(file)).endswith("default 24]")
    assert main(["--recipe", "tinny/finetune", "--help"]) == 1
    assert "did you mean tiny/finetune?" in capsys.readouterr().err


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
    lines = capsys.readouterr().out.split("attention backends\n")[1].split("\n\n")[0].splitlines()
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
