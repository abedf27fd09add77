"""Seconds of kernels, collectives and transfers: from a table, or from peak x efficiency.

    {"hardware": "...", "launch": 5e-6, "connect": 0.0,
     "operations":  {"matmul": {"each": 1e-5, "per_flop": 2e-15, "per_byte": 0.0}, ...},
     "collectives": {"all_reduce": {"each": 2e-5, "per_byte": 5e-12}, "all_reduce/8": ...},
     "transfer":    {"each": 1e-5, "per_byte": 2.5e-11}}

is a table: seconds of one call, and for each floating-point operation and byte of it. A collective
may be measured for one number of ranks (`all_reduce/8`); "*" stands for all that is not named.
Operations of a rehearsal are matmul, attention, elementwise, triton.NAME (rehearsal/recorder.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_croc.errors import DataError
from megatron_croc.file_reading import UnreadableError, read_json
from megatron_croc.planning.gpus import Gpu
from megatron_croc.planning.step_time import LATENCY
from megatron_croc.rehearsal.trace import Compute

LAUNCH = 5e-6
"""Seconds in which the host queues one kernel (assumption)."""

CONNECT = 0.0
"""Seconds of the first use of a communicator beyond the wait for its ranks; a later step has none,
so a predicted step leaves them out."""


class Costs(Protocol):
    """Seconds of each kind of work."""

    @property
    def source(self) -> str:
        """The origin of the costs, for the report."""
        ...

    @property
    def launch(self) -> float:
        """Seconds in which the host queues one kernel."""
        ...

    @property
    def connect(self) -> float:
        """Seconds of the first use of a communicator."""
        ...

    def compute(self, work: Compute) -> float:
        """Seconds of kernels that have no measured duration of their own."""
        ...

    def collective(self, kind: str, num_bytes: float, ranks: Sequence[int]) -> float:
        """Seconds of a collective once all ranks are there."""
        ...

    def transfer(self, num_bytes: float, sender: int, receiver: int) -> float:
        """Seconds of a send and its receive once both are there."""
        ...


@dataclass(frozen=True, kw_only=True)
class PeakCosts:
    """Costs from a GPU's data sheet and the efficiency that the planner uses."""

    gpu: Gpu
    launch: float = LAUNCH
    connect: float = CONNECT

    @property
    def source(self) -> str:
        """The origin of the costs."""
        return (
            f"not measured: {self.gpu.name} at {self.gpu.efficiency:.0%} of its peak, "
            "its memory's and its links' data-sheet rates"
        )

    def compute(self, work: Compute) -> float:
        """The longer of operations over peak x efficiency and bytes over the memory's rate.

        The efficiency is that of whole layers, so a segment of a layer's matrix products already
        has its small kernels in it.
        """
        operations = work.flops / (self.gpu.peak * self.gpu.efficiency)
        return max(operations, work.moved / self.gpu.memory_rate)

    def collective(self, kind: str, num_bytes: float, ranks: Sequence[int]) -> float:
        """Seconds of a ring over the group's slowest link."""
        size = len(ranks)
        if size == 1:
            return 0.0
        share = {"all_reduce": 2 * (size - 1) / size, "broadcast": 1.0, "barrier": 0.0}
        kind = kind.removesuffix("_object")
        return LATENCY + share.get(kind, (size - 1) / size) * num_bytes / self._rate(ranks)

    def transfer(self, num_bytes: float, sender: int, receiver: int) -> float:
        """Seconds of one message."""
        return LATENCY + num_bytes / self._rate((sender, receiver))

    def _rate(self, ranks: Sequence[int]) -> float:
        """Bytes per second of a ring; members of one node share their adapters in it."""
        per_node = self.gpu.gpus_per_node
        nodes = {rank // per_node for rank in ranks}
        if len(nodes) == 1:
            return self.gpu.link
        return min(self.gpu.link, self.gpu.network * max(1, len(ranks) // len(nodes)))


@dataclass(frozen=True, kw_only=True)
class _Rate:
    each: float = 0.0
    per_flop: float = 0.0
    per_byte: float = 0.0

    def seconds(self, *, flops: float = 0.0, num_bytes: float = 0.0, calls: int = 1) -> float:
        return self.each * calls + self.per_flop * flops + self.per_byte * num_bytes


@dataclass(frozen=True, kw_only=True)
class TableCosts:
    """Costs that were measured on one machine."""

    source: str
    operations: Mapping[str, _Rate]
    collectives: Mapping[str, _Rate]
    transfers: _Rate
    launch: float = 0.0
    connect: float = 0.0

    def compute(self, work: Compute) -> float:
        """Seconds from the row of this operation."""
        rate = self._row(self.operations, "operations", work.operation)
        return rate.seconds(flops=work.flops, num_bytes=work.moved, calls=work.kernels)

    def collective(self, kind: str, num_bytes: float, ranks: Sequence[int]) -> float:
        """Seconds from the row of this collective and number of ranks, or of this collective."""
        if len(ranks) == 1:
            return 0.0
        exact = self.collectives.get(f"{kind}/{len(ranks)}")
        rate = exact or self._row(self.collectives, "collectives", kind)
        return rate.seconds(num_bytes=num_bytes)

    def transfer(self, num_bytes: float, sender: int, receiver: int) -> float:
        """Seconds of one message, whatever its ends."""
        return self.transfers.seconds(num_bytes=num_bytes)

    def _row(self, rows: Mapping[str, _Rate], section: str, name: str) -> _Rate:
        rate = rows.get(name) or rows.get("*")
        if rate is None:
            raise DataError(
                f'{self.source}: {section} has no row "{name}"; measure it, or add a row "*"'
            )
        return rate


def read_costs(path: str | Path) -> TableCosts:
    """Read a table of measured costs.

    Raises:
        DataError: the file cannot be read, or a value of it is no cost.
    """
    try:
        return table_costs(read_json(path), name=str(path))
    except (OSError, UnreadableError) as error:
        raise DataError(f"{path}: the table of costs cannot be read: {error}") from error


def table_costs(tree: Mapping[str, Any], *, name: str) -> TableCosts:
    """Costs from a table that is already read.

    Raises:
        DataError: a key is unknown or missing, or a value is no cost.
    """
    known = {"hardware", "launch", "connect", "operations", "collectives", "transfer"}
    if unknown := sorted(set(tree) - known):
        raise DataError(f"{name}: unknown key {unknown[0]}; known are {', '.join(sorted(known))}")
    for key in ("operations", "collectives", "transfer"):
        if not isinstance(tree.get(key), Mapping):
            raise DataError(f"{name}: the table needs {key}, a JSON object")

    def rows(key: str) -> dict[str, _Rate]:
        return {row: _rate(value, f"{name}: {key}.{row}") for row, value in tree[key].items()}

    return TableCosts(
        source=f"measured: {name} ({tree.get('hardware', 'unknown hardware')})",
        operations=rows("operations"),
        collectives=rows("collectives"),
        transfers=_rate(tree["transfer"], f"{name}: transfer"),
        launch=_seconds(tree.get("launch", 0.0), f"{name}: launch"),
        connect=_seconds(tree.get("connect", 0.0), f"{name}: connect"),
    )


def _rate(value: Any, where: str) -> _Rate:
    if not isinstance(value, Mapping) or not set(value) <= {"each", "per_flop", "per_byte"}:
        raise DataError(f"{where}: an object of each, per_flop, per_byte is needed, not {value!r}")
    return _Rate(**{key: _seconds(number, f"{where}.{key}") for key, number in value.items()})


def _seconds(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: a number of seconds is needed, not {value!r}")
    if not math.isfinite(value) or value < 0:
        raise DataError(f"{where}: {value} is no number of seconds")
    return float(value)
