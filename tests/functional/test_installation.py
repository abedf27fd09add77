"""The pinned versions can be installed together, with no wheel but those of the package index."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("manylinux2010", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 29)))


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a pip that resolves from metadata alone and reads no local settings."""
    folder = tmp_path_factory.mktemp("pip")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(folder),
        "pip>=25",
    ]
    subprocess.run(command, check=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") or k == "PIP_CERT"}
    return clean | {"PYTHONPATH": str(folder), "PIP_CONFIG_FILE": os.devnull}


def requirements(*extras: str) -> list[str]:
    """Requirements of the package and of these extras, on Linux."""
    asked = []
    for line in metadata.requires("megatron-croc") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        if extra is None or extra[1] in extras:
            asked.append(requirement.strip())
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_pins_agree_with_each_other(python: str, pip: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += ["--python-version", python, "--only-binary=:all:", "--target", str(tmp_path)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    command += [*requirements("dali", "dev"), "-c", "constraints-cpu.txt"]
    done = subprocess.run(command, cwd=ROOT, env=pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
