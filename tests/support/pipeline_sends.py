"""Watch the memory of every point-to-point send of the pipeline until it is waited for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class _WatchedSend:
    """The handle of a send; notes, when it is waited for, whether its memory was freed before."""

    def __init__(self, work: Any, tensor: torch.Tensor, lost: list[bool]) -> None:
        self.work, self.lost = work, lost
        self.memory = StorageWeakRef(tensor.untyped_storage())  # gloo and NCCL read from here

    def wait(self) -> Any:
        self.lost.append(self.memory.expired())
        return self.work.wait()


@contextmanager
def watched_sends() -> Iterator[list[bool]]:
    """One entry for each send that has been waited for: True if its memory was freed before."""
    from megatron.core.pipeline_parallel import p2p_communication

    real = p2p_communication._p2p_ops
    lost: list[bool] = []

    def watched(**arguments: Any) -> dict[str, Any]:
        requests = real(**arguments)
        for way in requests.keys() & {"send_next", "send_prev"}:
            requests[way] = _WatchedSend(requests[way], arguments[f"tensor_{way}"], lost)
        return requests

    p2p_communication._p2p_ops = watched
    try:
        yield lost
    finally:
        p2p_communication._p2p_ops = real
