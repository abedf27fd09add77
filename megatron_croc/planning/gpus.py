"""Speed and memory of GPUs and their links, with the source of each number."""

from dataclasses import dataclass

from megatron_croc.config.base import nearest
from megatron_croc.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in nodes of eight."""

    name: str

    memory: float
    """Bytes a process can use; NVIDIA's data sheet, in GB."""

    memory_rate: float
    """Bytes per second of its memory; NVIDIA's data sheet."""

    peak: float
    """Dense bf16 operations per second; NVIDIA's data sheet."""

    efficiency: float
    """Share of the peak that layers of 4096 and wider reach without any communication."""

    efficiency_source: str

    link: float
    """Bytes per second one GPU sends to its node: half of NVLink's data-sheet figure (which counts
    both directions), times what collectives reach."""

    network: float
    """Bytes per second one GPU sends to other nodes: one 400 (H100) or 200 (A100) Gb/s adapter for
    each GPU, as in NVIDIA's DGX systems, times what collectives reach."""

    gpus_per_node: int = 8


BUS_SHARE = 0.8
"""Share of a link's nominal rate that large collectives reach (assumption, not measured)."""

_LLM_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md at 061f2c7"

_HOPPER_EFFICIENCY = 0.48
_HOPPER_SOURCE = (
    f"fitted to {_LLM_FOUNDRY}, H100 80GB BF16: MPT-7b, 13b without recomputation (46.4 %, 39.8 % "
    "MFU) and with it (70b on 64: 56.8 % HFU)"
)
_AMPERE_EFFICIENCY = 0.64
_AMPERE_SOURCE = f"fitted to {_LLM_FOUNDRY}, A100 80GB: MPT-7b, 13b (64.2 %, 59.6 % MFU)"


def _hopper(name: str, gigabytes: float, *, memory_rate: float) -> Gpu:
    return Gpu(
        name=name,
        memory=gigabytes * 1e9,
        memory_rate=memory_rate,
        peak=989e12,
        efficiency=_HOPPER_EFFICIENCY,
        efficiency_source=_HOPPER_SOURCE,
        link=450e9 * BUS_SHARE,
        network=50e9 * BUS_SHARE,
    )


def _ampere(name: str, gigabytes: float, *, memory_rate: float) -> Gpu:
    return Gpu(
        name=name,
        memory=gigabytes * 1e9,
        memory_rate=memory_rate,
        peak=312e12,
        efficiency=_AMPERE_EFFICIENCY,
        efficiency_source=_AMPERE_SOURCE,
        link=300e9 * BUS_SHARE,
        network=25e9 * BUS_SHARE,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _hopper("h100", 80, memory_rate=3.35e12),
        _hopper("h200", 141, memory_rate=4.8e12),
        _ampere("a100", 80, memory_rate=2.039e12),
        _ampere("a100-40", 40, memory_rate=1.555e12),
    )
}
"""Name -> GPU. H200: assumed as fast as H100, whose compute dies it has."""


def get_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: choose from {', '.join(GPUS)}{nearest(name, GPUS)}")
    return GPUS[name]
