"""Process groups without peers: every collective is recorded and done at once, with nothing in it.

torch.distributed stays as it is down to the methods of a group; those never reach a backend. Object
collectives answer as if every rank had sent what this one sends.
"""

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_croc.rehearsal.recorder import Recorder

_OUT, _IN = 0, 1
_NAMES: dict[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", _OUT),
    "allreduce_coalesced": ("all_reduce", _OUT),
    "broadcast": ("broadcast", _OUT),
    "reduce": ("reduce", _OUT),
    "allgather": ("all_gather", _OUT),
    "allgather_coalesced": ("all_gather", _OUT),
    "_allgather_base": ("all_gather", _OUT),
    "all_gather_single": ("all_gather", _OUT),
    "all_gather_single_coalesced": ("all_gather", _OUT),
    "allgather_into_tensor_coalesced": ("all_gather", _OUT),
    "reduce_scatter": ("reduce_scatter", _IN),
    "_reduce_scatter_base": ("reduce_scatter", _IN),
    "reduce_scatter_single": ("reduce_scatter", _IN),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _IN),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _IN),
    "gather": ("gather", _IN),
    "scatter": ("scatter", _OUT),
    "alltoall": ("all_to_all", _IN),
    "alltoall_base": ("all_to_all", _IN),
    "all_to_all_single": ("all_to_all", _IN),
    "barrier": ("barrier", _OUT),
    "send": ("send", _OUT),
    "recv": ("recv", _OUT),
}
"""Method of a process group -> name in the trace, and its argument with the larger side."""


class FakeHandle:
    """Handle of an operation; waiting for it makes the current stream wait.

    As in torch, the group keeps the operation's tensors until then, or until the operation is done
    if nobody waits for it.
    """

    def __init__(self, recorder: Recorder, number: int, tensors: Sequence[Tensor] = ()) -> None:
        """Wrap the operation `number` of the trace."""
        self._recorder, self._number = recorder, number
        if tensors:
            recorder.in_flight[number] = tensors

    def wait(self, timeout: object = None) -> bool:
        """Make the current stream wait for the operation."""
        self._recorder.wait_for(self._number)
        return True

    def is_completed(self) -> bool:
        """Return True: all work is done at once."""
        return True

    def get_future(self) -> Any:
        """Return a future that is done."""
        future: Any = torch.futures.Future()
        future.set_result(None)
        return future


def start_world(recorder: Recorder, *, rank: int, world_size: int) -> None:
    """Join a world of `world_size` ranks in which only this rank exists."""
    for method, (name, place) in _NAMES.items():
        if hasattr(dist.ProcessGroup, method):
            setattr(dist.ProcessGroup, method, _recorded(recorder, name, place))
    _replace("batch_isend_irecv", functools.partial(_batch, recorder))
    _replace_object_collectives(recorder)
    _replace("new_group", _on_fake_backend(dist.new_group))
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def _replace(name: str, function: Callable[..., Any]) -> None:
    setattr(dist, name, function)
    setattr(distributed_c10d, name, function)


def _on_fake_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(new_group)
    def created(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake", "pg_options": None})

    return created


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _recorded(recorder: Recorder, name: str, place: int) -> Callable[..., Any]:
    def method(group: Any, *args: Any, **kwargs: Any) -> FakeHandle:
        ranks = dist.get_process_group_ranks(group)
        if name in ("send", "recv"):
            (tensor,), peer = args[0], ranks[int(args[1])]
            direction = "send" if name == "send" else "receive"
            work = recorder.transfer(direction, group.group_name, ranks, tensor, peer=peer)
            return FakeHandle(recorder, work, [tensor])
        options = next((o for o in (*args, *kwargs.values()) if hasattr(o, "asyncOp")), None)
        root = getattr(options, "rootRank", None)
        work = recorder.collective(
            name,
            group.group_name,
            ranks,
            [] if name == "barrier" else list(_tensors(args[place])),
            others=[] if name == "barrier" else list(_tensors(args)),
            root=None if root is None else ranks[int(root)],
            is_async=bool(getattr(options, "asyncOp", False)),
        )
        if name == "barrier":
            recorder.host_waits("barrier")
        return FakeHandle(recorder, work)

    return method


def _batch(recorder: Recorder, operations: list[Any]) -> list[FakeHandle]:
    """batch_isend_irecv: one NCCL group of sends and receives, with one handle for all."""

    def call_all() -> None:
        for operation in operations:
            peer = "group_dst" if operation.op is dist.isend else "group_src"
            operation.op(operation.tensor, group=operation.group, **{peer: operation.group_peer})

    group = operations[0].group or distributed_c10d._get_default_group()
    work = recorder.batch(group.group_name, call_all)
    return [FakeHandle(recorder, work, [operation.tensor for operation in operations])]


def record_object(
    recorder: Recorder, name: str, value: Any, group: Any, root: int | None = None
) -> None:
    """Record a collective of objects: torch moves them pickled through the device's memory."""
    group = group or dist.group.WORLD
    if group.size() == 1:
        return
    payload = torch.empty(len(pickle.dumps(value)), dtype=torch.uint8, device="cuda")
    ranks = dist.get_process_group_ranks(group)
    recorder.collective(f"{name}_object", group.group_name, ranks, [payload], root=root)
    recorder.host_waits(f"{name} of objects")


def _replace_object_collectives(recorder: Recorder) -> None:
    def all_gather_object(into: list[Any], mine: Any, group: Any = None) -> None:
        into[:] = [mine] * len(into)
        record_object(recorder, "all_gather", mine, group)

    def gather_object(mine: Any, into: list[Any] | None = None, dst: int = 0, group: Any = None,
                      group_dst: int | None = None) -> None:  # fmt: skip
        if into is not None:
            into[:] = [mine] * len(into)
        record_object(recorder, "gather", mine, group, dst)

    def broadcast_object_list(
        values: list[Any], src: int = 0, group: Any = None, *_: Any, **__: Any
    ) -> None:
        record_object(recorder, "broadcast", values, group, src)

    _replace("all_gather_object", all_gather_object)
    _replace("gather_object", gather_object)
    _replace("broadcast_object_list", broadcast_object_list)
