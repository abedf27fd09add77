"""Data-sheet figures of the GPUs that the planner knows."""

import pytest

from megatron_croc.planning.gpus import get_gpu

# Dense BF16, memory, NVLink in both directions, and the network for each GPU in bits.
SHEETS = {
    "h100": (989e12, 80e9, 900e9, 400e9),
    "h200": (989e12, 141e9, 900e9, 400e9),
    "a100": (312e12, 80e9, 600e9, 200e9),
}


@pytest.mark.parametrize("name", SHEETS)
def test_rates_are_those_of_the_data_sheet(name: str):
    peak, memory, both_ways, bits = SHEETS[name]
    gpu = get_gpu(name)
    assert (gpu.peak, gpu.memory) == (peak, memory)
    # Large collectives reach 80 % of a link.
    assert gpu.link == pytest.approx(0.8 * both_ways / 2)
    assert gpu.network == pytest.approx(0.8 * bits / 8)
