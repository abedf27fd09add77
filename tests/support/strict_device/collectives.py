"""Collectives of a group come in the same order on all its ranks, with the same op, shape, dtype.

Each rank appends its record to the group's n-th entry in the job's store and compares it with what
is there already; nobody waits for anybody, so what NCCL lets overlap still does.
"""

import functools
import json
from collections import Counter
from typing import Any

import torch.distributed as dist

from tests.support.strict_device.job import Job, describe, place
from tests.support.strict_device.marks import tensors_in
from tests.support.strict_device.transfers import Transfers

_ALL = slice(None)
_OPERATIONS: dict[str, slice | None] = {
    "barrier": None,
    "allreduce": _ALL,
    "allreduce_coalesced": _ALL,
    "broadcast": _ALL,
    "reduce": _ALL,
    "allgather": _ALL,
    "allgather_coalesced": _ALL,
    "_allgather_base": _ALL,
    "all_gather_single": _ALL,
    "all_gather_single_coalesced": _ALL,
    "allgather_into_tensor_coalesced": _ALL,
    "reduce_scatter": _ALL,
    "_reduce_scatter_base": _ALL,
    "reduce_scatter_single": _ALL,
    "reduce_scatter_single_coalesced": _ALL,
    "reduce_scatter_tensor_coalesced": _ALL,
    # The root alone gives the list; splits differ by rank.
    "gather": slice(1, 2),
    "scatter": slice(0, 1),
    "alltoall": None,
    "alltoall_base": None,
    "all_to_all_single": None,
}
"""Methods of a process group, and which of the arguments have the same shapes on every rank."""


class Collectives:
    """The records of one rank."""

    def __init__(self, job: Job, transfers: Transfers) -> None:
        """No group has done anything."""
        self.job, self.transfers = job, transfers
        self.count: Counter[str] = Counter()

    def install(self) -> None:
        """Wrap the methods that torch.distributed's functions call."""
        for name in _OPERATIONS:
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._checked(name))

    def _checked(self, name: str) -> Any:
        real = getattr(dist.ProcessGroup, name)

        @functools.wraps(real)
        def checked(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.size() == 1:
                return real(group, *args, **kwargs)
            self.job.raise_faults()
            for tensor in tensors_in(args):
                self.transfers.check(group, f"{name} at {place()}", tensor)
            self.transfers.communicators.add(group.group_name)
            what = f"{name}({_signature(name, args, kwargs)})"
            if self.job.options.order:
                self._compare(group, what)
            work = real(group, *args, **kwargs)
            ranks = dist.get_process_group_ranks(group)
            title = f"{what} in group {ranks} at {place()}"
            return work if work is None else TimedWork(self.job, work, title, ranks)

        return checked

    def _compare(self, group: Any, what: str) -> None:
        name = group.group_name
        number = self.count[name]
        self.count[name] += 1
        self.job.report.num_collectives += 1
        mine = {"rank": self.job.rank, "what": what, "place": place()}
        key = f"strict/order/{name}/{number}"
        self.job.store.append(key, json.dumps(mine) + "\n")
        for line in self.job.store.get(key).decode().splitlines():
            theirs = json.loads(line)
            if theirs["what"] != what:
                self.job.fault(
                    f"collective {number} of group {dist.get_process_group_ranks(group)} differs: "
                    f"{what} at {mine['place']} here, {theirs['what']} at {theirs['place']} "
                    f"on rank {theirs['rank']}"
                )


class TimedWork:
    """A handle whose wait names both sides when it takes too long."""

    def __init__(self, job: Job, work: Any, name: str, ranks: list[int]) -> None:
        """Wrap `work`."""
        self._job, self._work, self._name, self._ranks = job, work, name, ranks

    def wait(self, timeout: object = None) -> Any:
        """Wait for the collective."""
        return self._job.wait(self._work, self._name, self._ranks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _signature(name: str, args: tuple, kwargs: dict) -> str:
    which = _OPERATIONS[name]
    parts = [describe(tensor) for tensor in tensors_in(args[which])] if which is not None else []
    if which is None:
        parts = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors_in(args)})
    for options in (*args, *kwargs.values()):
        for field in ("reduceOp", "rootRank"):
            if (value := getattr(options, field, None)) is not None:
                parts.append(f"{field} {value.op if hasattr(value, 'op') else value}")
    return ", ".join(parts)
