"""The command as a user types it: three stages, a resume, and what it says about wrong input."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.distributed import run_distributed

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = [
    "--num-layers=2",
    "--hidden-size=64",
    "--ffn-hidden-size=96",
    "--vision-num-layers=3",
    "--vision-hidden-size=32",
    "--vision-ffn-hidden-size=64",
    "--img-size=56",
    "--pool-size=32",
    "--micro-batch-size=2",
    "--global-batch-size=8",
    "--image-decoder=pil",
    "--num-workers=0",
]


def words(demo: Path, stage: str, *more: str) -> list[str]:
    return [
        f"--recipe=tiny/{stage}",
        f"--data-path={demo / stage}",
        f"--tokenizer-model={demo / 'tokenizer.model'}",
        *SMALL,
        *more,
    ]


def train(arguments: Sequence[str], *, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "megatron_croc", "train", *arguments]
    # Variables of a launcher around the tests are not this run's.
    strange = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in strange}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers_of(rows: list[dict]) -> list[dict]:
    """Columns that must be equal in two runs: all but times."""
    from megatron_croc.training.reporting.metrics_log import without_times

    return [without_times(row) for row in rows]


@pytest.fixture(scope="module")
def stages(demo: Path, tmp_path_factory) -> Path:
    """The three stages, each from the one before; the middle one on two processes."""
    root = tmp_path_factory.mktemp("runs")
    runs = {
        "pretrain_mlp": ["--train-iters=3"],
        "pretrain_croc": [
            "--train-iters=6",
            "--save-interval=3",
            "--eval-interval=3",
            "--eval-iters=1",
            "--global-batch-size=2",  # of the two held-out samples
            f"--valid-data-path={demo / 'valid_pretrain_croc'}",
            "--tensor-model-parallel-size=2",
            f"--pretrained-checkpoint={root / 'pretrain_mlp'}",
        ],
        "finetune": ["--train-iters=3", f"--pretrained-checkpoint={root / 'pretrain_croc'}"],
    }
    for stage, more in runs.items():
        launcher = TORCHRUN if stage == "pretrain_croc" else ()
        done = train(words(demo, stage, f"--save={root / stage}", *more), launcher=launcher)
        assert done.returncode == 0, done.stderr[-3000:]
        (root / f"{stage}.out").write_text(done.stdout)
    return root


@pytest.mark.distributed
def test_each_stage_trains_saves_and_hands_on(stages: Path):
    iterations = {"pretrain_mlp": 3, "pretrain_croc": 6, "finetune": 3}
    for stage, last in iterations.items():
        rows = [row for row in rows_of(stages / stage) if "loss" in row]
        assert [row["iteration"] for row in rows] == list(range(1, last + 1))
        # log(512) = 6.24 at random weights; a wrong shift or mask would be far off.
        assert all(4.0 < row["text_loss"] < 7.0 for row in rows), rows
        assert all(row["grad_norm"] > 0 for row in rows)
        assert ("reconstruction_loss" in rows[0]) == (stage == "pretrain_croc")
        tracker = stages / stage / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == f"{last}\n"
        state = json.loads((stages / stage / f"iter_{last:07d}" / "train_state.json").read_text())
        batch = 2 if stage == "pretrain_croc" else 8
        assert state["consumed_samples"] == last * batch == rows[-1]["consumed_samples"]
        assert state["stage"] == stage
    assert (stages / "pretrain_croc" / "iter_0000003").is_dir()
    taken = "loaded weights from"
    assert taken not in (stages / "pretrain_mlp.out").read_text()
    middle, last = ((stages / f"{s}.out").read_text() for s in ("pretrain_croc", "finetune"))
    assert f"{stages / 'pretrain_mlp' / 'iter_0000003'}; fresh: prompt_pool" in middle
    assert f"{taken} {stages / 'pretrain_croc' / 'iter_0000006'}" in last and "fresh" not in last
    assert middle.count(taken) == 1  # rank 0 speaks


@pytest.mark.distributed
def test_validation_is_written_and_the_rates_are_those_of_the_stage(stages: Path):
    rows = rows_of(stages / "pretrain_croc")
    valid = [row for row in rows if "valid_loss" in row]
    assert [row["iteration"] for row in valid] == [3, 6]
    for row in valid:
        together = row["valid_text_loss"] + 10 * row["valid_reconstruction_loss"]
        assert row["valid_loss"] == pytest.approx(together)
    trained = {"projector", "prompt_pool", "language_model", "reconstruction_head"}
    assert {name[3:] for name in rows[0] if name.startswith("lr/")} == trained
    mlp = rows_of(stages / "pretrain_mlp")[0]
    assert {name[3:] for name in mlp if name.startswith("lr/")} == {"projector"}


def resume(arguments: list[str]) -> int:
    from megatron_croc.cli.train import main

    return main(arguments)


@pytest.mark.distributed
def test_resuming_gives_the_very_numbers_of_the_run_that_went_on(
    demo: Path, stages: Path, tmp_path: Path
):
    """A run that died after step 3 of 6: its checkpoint, and nothing of what came later."""
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(stages / "pretrain_croc" / "iter_0000003", again / "iter_0000003")
    (again / "latest_checkpointed_iteration.txt").write_text("3\n")
    arguments = words(
        demo,
        "pretrain_croc",
        f"--save={again}",
        "--train-iters=6",
        "--global-batch-size=2",
        "--eval-interval=3",
        "--eval-iters=1",
        f"--valid-data-path={demo / 'valid_pretrain_croc'}",
        "--tensor-model-parallel-size=2",
    )
    assert run_distributed(resume, 2, arguments) == [0, 0]
    whole, part = numbers_of(rows_of(stages / "pretrain_croc")), numbers_of(rows_of(again))
    expected = [row for row in whole if row["iteration"] > 3]
    assert len(part) == 4  # three steps and a validation
    assert part == expected  # bit for bit: JSON keeps every digit of a float
    # The steps before were other ones: equality says something.
    losses = [row["loss"] for row in whole if "loss" in row]
    assert len(set(losses)) == 6


def run_all(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status and stderr of each command line, one after the other in one process."""
    from megatron_croc.cli.train import main
    from megatron_croc.parallel.groups import stop_distributed

    answers = []
    for arguments in commands:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = main(arguments)
        answers.append((status, stderr.getvalue()))
        stop_distributed()
    return answers


@pytest.mark.distributed
def test_every_wrong_input_is_one_clear_error(demo: Path, stages: Path, tmp_path: Path):
    elsewhere = f"--save={tmp_path / 'save'}"
    broken = tmp_path / "broken"
    shutil.copytree(demo / "finetune", broken)
    shard = sorted(broken.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    tracker = tmp_path / "tracker"
    tracker.mkdir()
    (tracker / "latest_checkpointed_iteration.txt").write_text("77\n")
    mlp, croc = stages / "pretrain_mlp", stages / "pretrain_croc"
    cases = {
        "missing data": (["--data-path=/nowhere/at/all"], ["data_path=/nowhere/at/all", "no such"]),
        "missing tokenizer": (["--tokenizer-model=/nowhere/t.model"], ["/nowhere/t.model"]),
        "heads": (
            ["--tensor-model-parallel-size=3"],
            ["tensor_model_parallel_size=3", "num_attention_heads=4", "2 is the next smaller"],
        ),
        "unknown setting": (["--tensor-parallel=2"], ["--tensor-parallel"]),
        "batch": (["--global-batch-size=7"], ["global_batch_size=7", "micro_batch_size=2"]),
        "another stage": (
            [f"--load={croc}"],
            ["iter_0000006", "pretrain_croc", "finetune", f"--pretrained-checkpoint {croc}"],
        ),
        "another architecture": (
            [f"--pretrained-checkpoint={mlp}", "--ffn-hidden-size=128"],
            ["iter_0000003", "mlp.linear_fc1.weight", "another architecture"],
        ),
        "not a checkpoint": (
            [f"--pretrained-checkpoint={demo}"],
            [f"--pretrained-checkpoint {demo}", "no checkpoint"],
        ),
        "lost checkpoint": ([f"--load={tracker}"], ["iter_0000077", "no such folder"]),
        "broken shard": ([f"--data-path={broken}"], [shard.name]),
    }
    commands = [
        words(demo, "finetune", "--train-iters=1", elsewhere, *more) for more, _ in cases.values()
    ]
    (answers,) = run_distributed(run_all, 1, commands)
    for (name, (_, fragments)), (status, stderr) in zip(cases.items(), answers, strict=True):
        assert status == 1, (name, stderr)
        assert stderr.startswith("error") and "Traceback" not in stderr, (name, stderr)
        for fragment in fragments:
            assert fragment in stderr, (name, stderr)
        single = name not in ("heads", "another architecture")  # those list several faults
        assert (len(stderr.strip().splitlines()) == 1) == single, (name, stderr)
    assert not (tmp_path / "save" / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.distributed
def test_a_run_goes_on_in_its_own_folder_and_in_no_other(demo: Path, tmp_path: Path):
    """Without --load, as one command after the other: runs and refusals, and what is left."""
    save = tmp_path / "save"
    more_data = [str(demo / "finetune"), str(demo / "pretrain_mlp")]

    def command(*more: str, stage: str = "finetune") -> list[str]:
        return words(demo, stage, f"--save={save}", "--save-interval=1", *more)

    commands = {
        "a new run": command("--train-iters=1"),
        "it goes on": command("--train-iters=2", "--lr=1e-4"),
        "a branch": [
            *command("--train-iters=3", f"--load={save}"),
            f"--save={tmp_path / 'branch'}",
        ],
        "the branch again": [
            *command("--train-iters=4", f"--load={save}"),
            f"--save={tmp_path / 'branch'}",
        ],
        "another seed": command("--train-iters=3", "--seed=5"),
        "another model": command("--train-iters=3", "--num-layers=3"),
        "another stage": command("--train-iters=3", stage="pretrain_mlp"),
        "other data": command("--train-iters=3", "--data-path", *more_data),
        "no folder": [*command(), "--save=/proc/nowhere"],
    }
    refused = {
        "another seed": ["seed 1234 there, 5 here", f"--load {save}", "another folder"],
        "another model": ["num_layers 2 there, 3 here"],
        "another stage": ["stage finetune", f"--pretrained-checkpoint {save}"],
        "other data": ["another order of samples"],
        "no folder": ["save=/proc/nowhere: cannot be written"],
    }
    (answers,) = run_distributed(run_all, 1, list(commands.values()))
    for name, (status, stderr) in zip(commands, answers, strict=True):
        assert status == (1 if name in refused else 0), (name, stderr)
        for fragment in refused.get(name, ()):
            assert fragment in stderr, (name, stderr)
        assert len(stderr.splitlines()) == (name in refused), (name, stderr)
    assert [row["iteration"] for row in rows_of(save)] == [1, 2]
    assert [row["iteration"] for row in rows_of(tmp_path / "branch")] == [3, 4]
    ids = {}
    for root, iterations in ((save, (1, 2)), (tmp_path / "branch", (3, 4))):
        states = [root / f"iter_{i:07d}" / "train_state.json" for i in iterations]
        (ids[root],) = {json.loads(state.read_text())["run_id"] for state in states}
        assert (root / "run_id.txt").read_text() == f"{ids[root]}\n"
        assert not (root / "run.lock").exists()
    assert len(set(ids.values())) == 2
    # The refused ones have left nothing; the settings of each part of the run are kept.
    assert "train_iters: 2" in (save / "run.yaml").read_text()
    assert "train_iters: 1" in (save / "run_0000001.yaml").read_text()
    assert sorted(path.name for path in save.glob("run*")) == [
        "run.yaml", "run_0000001.yaml", "run_id.txt",
    ]  # fmt: skip


def test_the_process_itself_ends_with_status_1_and_one_line(demo: Path):
    done = train(words(demo, "finetune", "--data-path=/nowhere/at/all"))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "data_path=/nowhere/at/all" in line
