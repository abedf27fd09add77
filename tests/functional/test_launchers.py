"""The very scripts of examples/, on two made-up nodes of this machine; and their linters."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_croc.config.checks import find_faults
from megatron_croc.planning.memory import estimate_memory
from megatron_croc.recipes.command_line import parse_command, run_parser
from tests.support import fake_slurm
from tests.support.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.sh"))
CONFIGS = sorted((ROOT / "examples").glob("*/configs/*.yaml"))
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def cluster(demo, tmp_path_factory) -> dict[str, str]:
    """The environment of a user of the made-up cluster."""
    state = tmp_path_factory.mktemp("slurm")
    fake_slurm.install(state / "bin")
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    return environment | {
        "PATH": f"{state / 'bin'}:{BIN}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FAKE_SLURM": str(state),
        "TOKENIZER": str(demo / "tokenizer.model"),
        "GPUS_PER_NODE": "1",
    }


@pytest.fixture(scope="module")
def start(cluster, demo, tmp_path_factory) -> Path:
    """Any checkpoint will do: one step of stage 1 from fresh weights."""
    folder = tmp_path_factory.mktemp("start")
    command = [
        sys.executable, "-m", "megatron_croc", "train", "--recipe=tiny/pretrain_mlp",
        f"--data-path={demo / 'pretrain_mlp'}", f"--tokenizer-model={cluster['TOKENIZER']}",
        "--train-iters=1", "--micro-batch-size=1", "--global-batch-size=1", "--num-workers=0",
        f"--save={folder}",
    ]  # fmt: skip
    bash(command, cluster)
    return folder


def bash(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    logs = "".join(p.read_text()[-3000:] for p in Path(environment["FAKE_SLURM"]).glob("log-*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done.stdout


def iterations(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").open()]


@pytest.mark.distributed
def test_three_stages_as_jobs_on_two_nodes(cluster, demo, start, tmp_path):
    out = tmp_path / "all"
    printed = bash(
        ["examples/run_all_stages.sh", "--partition=cpu"],
        cluster
        | {
            "DATA_MLP": str(demo / "pretrain_mlp"),
            "DATA_CROC": str(demo / "pretrain_croc"),
            "DATA_FINETUNE": str(demo / "finetune"),
            "START": str(start),
            "RECIPE": "tiny",
            "CLUSTER": "2x1",
            "OUT": str(out),
            "MASTER_PORT": str(free_port()),
            "FAKE_SLURM": fresh_state(tmp_path),
        },
    )
    assert "pretrain_mlp 1, pretrain_croc 2, finetune 3" in printed
    for stage in ("pretrain_mlp", "pretrain_croc", "finetune"):
        assert iterations(out / stage) == [1, 2, 3, 4, 5, 6]
        assert (out / stage / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    calls = calls_of(tmp_path)
    jobs = [words for name, *words in calls if name == "sbatch"]
    assert ["--dependency=afterok:2" in words for words in jobs] == [False, False, True]
    assert all("--partition=cpu" in words and "--nodes=2" in words for words in jobs)


@pytest.mark.distributed
def test_a_job_told_its_end_saves_and_goes_back_into_the_queue(cluster, demo, start, tmp_path):
    save = tmp_path / "save"
    bash(
        ["sbatch", "--nodes=2", "examples/pretrain_croc/sbatch.sh", "--train-iters=40",
         "--save-interval=1000", "--log-interval=1"],
        cluster
        | {
            "CONFIG": "examples/pretrain_croc/configs/tiny_2x1.yaml",
            "DATA": str(demo / "pretrain_croc"),
            "START": str(start),
            "SAVE": str(save),
            "MASTER_PORT": str(free_port()),  # not by the number: other tests have a job 1
            "FAKE_SLURM": fresh_state(tmp_path),
            "FAKE_SLURM_END_AT": str(save / "metrics.jsonl"),
        },
    )  # fmt: skip
    assert iterations(save) == list(range(1, 41))
    stopped = [int(p.name[5:]) for p in save.glob("iter_*") if p.name != "iter_0000040"]
    assert len(stopped) == 1 and 0 < stopped[0] < 40
    assert ["scontrol", "requeue", "1"] in calls_of(tmp_path)


def test_one_node(cluster, demo, start, tmp_path):
    bash(
        ["examples/pretrain_mlp/run.sh", "--train-iters=2"],
        cluster
        | {
            "CONFIG": "examples/pretrain_mlp/configs/tiny_2x1.yaml",
            "DATA": str(demo / "pretrain_mlp"),
            "START": str(start),
            "SAVE": str(tmp_path / "save"),
        },
    )
    assert iterations(tmp_path / "save") == [1, 2]


def test_a_missing_variable_is_named(cluster):
    for variable in ("DATA", "START"):
        given = {"DATA": "x", "START": "y"}
        del given[variable]
        done = subprocess.run(
            ["examples/finetune/run.sh"],
            cwd=ROOT, env=cluster | given, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode != 0 and f"set {variable} to" in done.stderr


def test_container_flags_reach_srun(cluster, tmp_path):
    """With pyxis the repository is mounted at its own path and the user's mounts are added."""
    state = fresh_state(tmp_path)
    done = subprocess.run(
        ["sbatch", "--nodes=1", "examples/finetune/sbatch.sh"],
        cwd=ROOT,
        env=cluster
        | {
            "FAKE_SLURM": state,
            "CONTAINER_IMAGE": "/images/croc.sqsh",
            "CONTAINER_MOUNTS": "/data:/data",
            "DATA": "/nowhere",
            "START": "/nowhere",
            "MAX_RESTARTS": "0",
            "CONFIG": "examples/finetune/configs/tiny_2x1.yaml",
        },
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0  # there is no data at /nowhere
    log = (Path(state) / "log-1").read_text()
    assert "data_path=/nowhere: no such folder" in log
    steps = [words for name, *words in calls_of(tmp_path) if name == "srun"]
    assert len(steps) == 1  # the fault is found before the nodes are looked at
    for words in steps:
        assert "--container-image=/images/croc.sqsh" in words
        assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in words


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_a_cluster_config_is_possible_and_fits_80_gb(config):
    recipe, nodes, gpus = re.fullmatch(r"(.+)_(\d+)x(\d+)", config.stem).groups()
    world_size = int(nodes) * int(gpus)
    _, run = parse_command(run_parser(prog="", description=""), ["--config", str(config)])
    assert find_faults(run, world_size) == []
    assert config.read_text().count(f"recipe: {recipe}/{config.parts[-3]}") == 1
    assert run.stage == config.parts[-3]
    assert max(rank.total for rank in estimate_memory(run, world_size)) < 0.9 * 80 * 2**30


def test_scripts_pass_shellcheck():
    subprocess.run([BIN / "shellcheck", "-x", *SCRIPTS], cwd=ROOT, check=True)


def test_dockerfile_passes_hadolint():
    if shutil.which(BIN / "hadolint") is None:
        pytest.skip("hadolint is not installed")
    subprocess.run([BIN / "hadolint", "Dockerfile.ngc"], cwd=ROOT, check=True)


def test_the_images_constraints_give_way_to_ours_and_no_further(tmp_path):
    """The Dockerfile's own lines, on a file of pins as NVIDIA's image has one."""
    commands = re.findall(r"&& (sed .+) \\$", (ROOT / "Dockerfile.ngc").read_text(), re.MULTILINE)
    pins = tmp_path / "constraint.txt"
    pins.write_text("numpy==1.26.4\npackaging==23.2\nTransformers==4.40.0\npackaging-legacy==1.0\n")
    script = " && ".join(commands).replace("/tmp/", f"{tmp_path}/")
    environment = {**os.environ, "PIP_CONSTRAINT": str(pins)}
    subprocess.run(["bash", "-ec", script], cwd=ROOT, env=environment, check=True)
    left = (tmp_path / "constraints-of-the-base").read_text()
    assert left == "numpy==1.26.4\npackaging-legacy==1.0\n"


def test_dockerfile_copies_what_is_there():
    for line in re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile.ngc").read_text(), re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source


def fresh_state(tmp_path: Path) -> str:
    state = tmp_path / "slurm"
    state.mkdir()
    return str(state)


def calls_of(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "slurm" / "calls.log").open()]


def test_a_wrong_setting_ends_a_script_before_torchrun(cluster, demo, tmp_path):
    """With no torchrun on the way: it would be told, too."""
    done = subprocess.run(
        ["examples/finetune/run.sh"],
        cwd=ROOT,
        env=cluster
        | {
            "DATA": str(demo / "finetune"),
            "START": str(tmp_path),
            "TOKENIZER": "/nowhere/t.model",
            "CONFIG": "examples/finetune/configs/tiny_2x1.yaml",
            "SAVE": str(tmp_path / "save"),
            "PATH": f"{stub_torchrun(tmp_path, 'echo torchrun >&2; exit 3')}:{cluster['PATH']}",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: tokenizer_model=/nowhere/t.model: no such file")


def test_the_error_of_a_worker_is_the_last_line(cluster, tmp_path):
    stub = 'echo "error: told" >$CROC_ERROR_FILE; echo "a long traceback" >&2; exit 1'
    done = run_stub(cluster, tmp_path, stub)
    _, err = done.communicate(timeout=20)
    assert done.returncode == 1
    assert err.splitlines() == ["a long traceback", "", "error: told"]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_reaches_the_workers_and_not_torchrun(cluster, tmp_path, presses):
    """The group gets SIGINT, as from a terminal; one worker that saves, and one that never ends."""
    handler = {1: "lambda *_: (open('told', 'w'), os._exit(0))", 2: "signal.SIG_IGN"}[presses]
    worker = (
        "import os, signal, time; parent = os.getppid(); "
        f"signal.signal(signal.SIGINT, {handler}); open('ready', 'w')\n"
        "while os.getppid() == parent: time.sleep(0.02)"
    )
    stub = (
        f"exec {sys.executable} - <<'END'\n"
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: open('torchrun-was-told', 'w'))\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)\n"
        "sys.exit(worker.wait())\nEND"
    )
    done = run_stub(cluster, tmp_path, stub)
    ready = tmp_path / "ready"
    while not ready.exists():
        assert done.poll() is None
        os.sched_yield()
    for press in range(presses):
        os.killpg(done.pid, signal.SIGINT)
        if press + 1 < presses:
            with pytest.raises(subprocess.TimeoutExpired):
                done.wait(timeout=0.3)
    _, err = done.communicate(timeout=20)
    assert done.returncode == 130
    assert (tmp_path / "told").exists() == (presses == 1)
    assert not (tmp_path / "torchrun-was-told").exists()
    assert ("stopped at once" in err) == (presses == 2)


def stub_torchrun(folder: Path, script: str) -> Path:
    """Write a command `torchrun` into a folder for PATH; returns the folder."""
    path = folder / "bin" / "torchrun"
    path.parent.mkdir()
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path.parent


def run_stub(cluster: dict[str, str], folder: Path, script: str) -> subprocess.Popen:
    """Start run_torchrun with a made-up torchrun, in a process group of its own."""
    path = f"{stub_torchrun(folder, script)}:{cluster['PATH']}"
    command = (
        f"cd {ROOT}; source examples/launch/torchrun.sh; cd {folder}; run_torchrun; exit $status"
    )
    return subprocess.Popen(
        ["bash", "-euc", command], env=cluster | {"PATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
