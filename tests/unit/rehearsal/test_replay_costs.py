"""Costs: worked out by hand from a data sheet, read from a table, and refused when damaged."""

import json
from pathlib import Path

import pytest

from megatron_croc.errors import DataError
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.planning.step_time import LATENCY
from megatron_croc.rehearsal.replay.costs import PeakCosts, read_costs
from megatron_croc.rehearsal.trace import Compute

H100 = get_gpu("h100")

TABLE = {
    "hardware": "a test",
    "launch": 1e-6,
    "operations": {"matmul": {"each": 1.0, "per_flop": 2.0}, "*": {"per_byte": 3.0}},
    "collectives": {"all_reduce": {"each": 5.0}, "all_reduce/4": {"each": 7.0, "per_byte": 1.0}},
    "transfer": {"each": 2.0, "per_byte": 0.5},
}


def test_peak_costs() -> None:
    costs = PeakCosts(gpu=H100)
    big = Compute(flops=1e15, moved=1.0)
    assert costs.compute(big) == pytest.approx(1e15 / (989e12 * 0.48))
    assert costs.compute(Compute(moved=3.35e12)) == pytest.approx(1.0)
    node = range(8)
    assert costs.collective("all_reduce", 8e9, node) == pytest.approx(LATENCY + 14e9 / H100.link)
    assert costs.collective("all_gather", 8e9, node) == pytest.approx(LATENCY + 7e9 / H100.link)
    # One rank on each of two nodes has one adapter; eight on each have eight.
    assert costs.collective("all_gather", 2e9, (0, 8)) == pytest.approx(
        LATENCY + 1e9 / H100.network
    )
    both = costs.collective("all_gather", 16e9, range(16))
    assert both == pytest.approx(LATENCY + 15e9 / min(H100.link, 8 * H100.network))
    assert costs.transfer(1e9, 7, 8) == pytest.approx(LATENCY + 1e9 / H100.network)
    assert costs.collective("all_reduce", 1e9, (3,)) == 0.0
    assert "not measured" in costs.source


def test_a_table_of_measured_costs(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(TABLE))
    costs = read_costs(path)
    assert costs.compute(Compute(operation="matmul", kernels=2, flops=10.0)) == 22.0
    assert costs.compute(Compute(operation="add", moved=2.0)) == 6.0
    assert costs.collective("all_reduce", 3.0, (0, 1)) == 5.0
    assert costs.collective("all_reduce", 3.0, (0, 1, 2, 3)) == 10.0
    assert costs.transfer(4.0, 0, 1) == 4.0 and costs.launch == 1e-6
    assert "measured" in costs.source and "a test" in costs.source
    with pytest.raises(DataError, match=r'costs\.json .*collectives has no row "broadcast"'):
        costs.collective("broadcast", 1.0, (0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operation": {}}, "unknown key operation"),
        ({"transfer": 3}, "needs transfer"),
        ({"operations": {"mm": {"seconds": 1}}}, "operations.mm: an object of each"),
        ({"operations": {"mm": {"each": -1}}}, "operations.mm.each: -1 is no number of seconds"),
        ({"operations": {"mm": {"each": "1"}}}, "operations.mm.each: a number of seconds"),
        ({"launch": True}, "launch: a number of seconds"),
        ({"connect": float("nan")}, "connect: nan is no number"),
    ],
)
def test_a_damaged_table_names_its_key(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({**TABLE, **change}))
    with pytest.raises(DataError, match=message):
        read_costs(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", None])
def test_a_table_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "costs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=r"costs\.json: the table of costs cannot be read"):
        read_costs(path)
