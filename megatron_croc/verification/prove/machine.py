"""Devices and versions of this machine.

Run as a module it prints them as JSON: the process that holds the list stays free of CUDA, so that
it takes no memory of the GPU from what it starts.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field

from megatron_croc.errors import CrocError

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "apex"),
    *("nvidia-dali-cuda130", "transformers"),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware and versions that a result depends on."""

    device: str
    """Name of the GPU, or `cpu`."""

    num_gpus: int
    memory_gib: float
    """Memory of one GPU; 0 without one."""

    driver: str
    cores: int
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version, of those that are installed."""

    @property
    def title(self) -> str:
        """Hardware in a few words."""
        if not self.num_gpus:
            return f"CPU, {self.cores} cores"
        return f"{self.num_gpus} x {self.device}, {self.memory_gib:.0f} GiB"

    def has(self, package: str) -> bool:
        """True when a package is installed."""
        return package in self.versions


def look(python: str = sys.executable) -> Machine:
    """Describe this machine, from a process of its own.

    Raises:
        CrocError: torch cannot be imported, or does not answer within two minutes.
    """
    command = [python, "-m", "megatron_croc.verification.prove.machine"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return Machine(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        raise CrocError("the GPU driver does not answer: nvidia-smi tells more") from None
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CrocError(f"this machine cannot be described: {last}") from None


def _describe() -> Machine:
    from importlib import metadata

    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = torch.cuda.get_device_properties(0) if num_gpus else None
    return Machine(
        device=properties.name if properties else "cpu",
        num_gpus=num_gpus,
        memory_gib=properties.total_memory / 2**30 if properties else 0.0,
        driver=_driver() if num_gpus else "",
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        versions=versions,
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    print(json.dumps(asdict(_describe())))
