"""Verdict on memory: what a rank of a run needs, compared with what its device has.

`croc check`, `croc plan` and `croc doctor` all decide here. Expected memory is that of the longest
samples of a workload; the worst case is every sample of full seq_length.
"""

from dataclasses import dataclass, replace

from megatron_croc.config.base import as_flags
from megatron_croc.config.checks import find_faults
from megatron_croc.config.run import RunConfig
from megatron_croc.planning.gpus import Gpu
from megatron_croc.planning.layouts import changed, memory_savings
from megatron_croc.planning.memory import MemoryEstimate, Pack, estimate_memory, longest_pack
from megatron_croc.planning.workload import Workload

RESERVED = 4e9
"""Bytes of a GPU kept for CUDA, NCCL and the kernels' workspaces (an assumption)."""

HOST_RESERVED = 1e9
"""Bytes of a process on the CPU kept for Python, torch and the data workers (an assumption; a run
of the tiny recipe peaked at 0.7 GiB in all)."""

FRAGMENTATION = 1.1
"""Ratio of the memory that the allocator reserves to that of the tensors (assumption)."""

GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """Memory that one process can use."""

    name: str
    memory: float
    """Bytes, all of them."""

    reserved: float = RESERVED
    """Bytes that are not for tensors."""

    per_node: int = 8
    """Devices of one node: the largest tensor-parallel size that is tried."""


def gpu_memory(gpu: Gpu) -> Device:
    """Memory of a GPU of the planner's table."""
    return Device(name=gpu.name, memory=gpu.memory, per_node=gpu.gpus_per_node)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Memory of the ranks of a run on a device."""

    device: Device
    stages: list[MemoryEstimate]
    """One rank of each pipeline stage."""

    @property
    def tensors(self) -> float:
        """Bytes of the tensors on the fullest rank, as `croc plan` lists them."""
        return max(stage.peak for stage in self.stages)

    @property
    def needed(self) -> float:
        """Bytes of the fullest rank, with fragmentation and reserve."""
        return FRAGMENTATION * self.tensors + self.device.reserved

    @property
    def free(self) -> float:
        """Bytes left on the fullest rank; negative: it does not fit."""
        return self.device.memory - self.needed

    @property
    def fits(self) -> bool:
        """True when every rank fits."""
        return self.free >= 0

    def __str__(self) -> str:
        """Say in a few words if it fits, with the figures in GiB."""
        fragments = (FRAGMENTATION - 1) * self.tensors
        return (
            f"{'fits' if self.fits else 'does not fit'} on {self.device.name}: needs "
            f"{self.needed / GIB:.1f} of {self.device.memory / GIB:.1f} GiB (tensors "
            f"{self.tensors / GIB:.1f}, fragmentation {fragments / GIB:.1f}, reserve "
            f"{self.device.reserved / GIB:.1f})"
        )


def expected_fit(run: RunConfig, world_size: int, device: Device, workload: Workload) -> Fit:
    """Memory for the longest samples that the workload expects."""
    return _fit(run, world_size, device, workload.pack(run))


def worst_fit(run: RunConfig, world_size: int, device: Device, workload: Workload) -> Fit:
    """Memory with every sample of a micro-batch as long as seq_length."""
    longest, expected = longest_pack(run), workload.pack(run)
    pack = replace(longest, images=max(longest.images, expected.images))
    return _fit(run, world_size, device, pack)


def _fit(run: RunConfig, world_size: int, device: Device, pack: Pack) -> Fit:
    return Fit(device=device, stages=estimate_memory(run, world_size, pack))


def way_out(run: RunConfig, world_size: int, device: Device, workload: Workload) -> str | None:
    """Flags that make a run fit its device, as few as possible; None if no layout fits."""
    for changes in memory_savings(run, world_size, device.per_node):
        candidate = changed(run, changes)
        if find_faults(candidate, world_size):
            continue
        if expected_fit(candidate, world_size, device, workload).fits:
            return as_flags(RunConfig, changes)
    return None
