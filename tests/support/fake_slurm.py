"""A cluster on this machine: sbatch, srun, scontrol and scancel as far as our job scripts use them.

`install` puts four commands of these names into a folder for PATH. A job runs while sbatch waits;
its nodes are processes on loopback. Everything that was called is noted in FAKE_SLURM/calls.log.

A job can be told its end, as `#SBATCH --signal=B:USR1@...` does: once the file FAKE_SLURM_END_AT
exists, the batch script of a first run gets USR1.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "scancel")
ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path) -> None:
    """Write the four commands into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        command.chmod(0o755)


def main() -> int:
    name, words = sys.argv[1], sys.argv[2:]
    state = Path(os.environ["FAKE_SLURM"])
    with (state / "calls.log").open("a") as log:
        log.write(json.dumps([name, *words]) + "\n")
    return {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}[name](
        state, words
    )


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Leading --name=value options, and what follows them."""
    options: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("--"):
        name, _, value = rest.pop(0)[2:].partition("=")
        options[name] = value
    return options, rest


def sbatch(state: Path, words: list[str]) -> int:
    given, (script, *arguments) = _options(words)
    header = re.findall(r"^#SBATCH --(\S+?)(?:=(\S+))?$", Path(script).read_text(), re.MULTILINE)
    options = dict(header) | given
    number = str(len(list(state.glob("job-*"))) + 1)
    (state / f"job-{number}").write_text(json.dumps(options))
    dependency = options.get("dependency", "").removeprefix("afterok:")
    if dependency and not (state / f"done-{dependency}").exists():
        print(f"job {number}: dependency {dependency} never satisfied", file=sys.stderr)
        return 1
    nodes = int(options["nodes"])
    environment = os.environ | {
        "SLURM_JOB_ID": number,
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["127.0.0.1"] * nodes),
        "SLURM_SUBMIT_DIR": os.getcwd(),
    }
    spool = state / f"spool-{number}.sh"  # Slurm runs a copy, away from the repository
    spool.write_text(Path(script).read_text())
    log_path = state / f"log-{number}"
    code, restarts = 0, 0
    while True:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
        with log_path.open("a") as log:
            job = subprocess.Popen(
                ["bash", str(spool), *arguments], env=environment, stdout=log, stderr=log
            )
            if restarts == 0 and os.environ.get("FAKE_SLURM_END_AT"):
                _announce_end(job, Path(os.environ["FAKE_SLURM_END_AT"]))
            code = job.wait()
        requeue = state / f"requeue-{number}"
        if not requeue.exists():
            break
        requeue.unlink()
        restarts += 1
    if code == 0:
        (state / f"done-{number}").touch()
    print(number)
    return code


def _announce_end(job: subprocess.Popen, when: Path) -> None:
    while job.poll() is None:
        if when.exists():
            job.send_signal(signal.SIGUSR1)
            return
        time.sleep(0.05)


def srun(state: Path, words: list[str]) -> int:
    options, command = _options(words)
    job = os.environ["SLURM_JOB_ID"]
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)},
            start_new_session=True,  # a task is a process group of its own
        )
        for node in range(int(options.get("nodes", os.environ["SLURM_NNODES"])))
    ]
    step = state / f"step-{job}"
    step.write_text(" ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    step.unlink()
    return max(codes, key=abs)


def scontrol(state: Path, words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(words[2].split(",")))
        return 0
    if words[0] == "requeue":
        (state / f"requeue-{words[1]}").touch()
        return 0
    return 2


def scancel(state: Path, words: list[str]) -> int:
    options, (job,) = _options(words)
    number = signal.Signals[f"SIG{options['signal']}"]
    for pid in (state / f"step-{job}").read_text().split():
        os.killpg(int(pid), number)
    return 0


if __name__ == "__main__":
    sys.exit(main())
