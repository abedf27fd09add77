"""Point-to-point as NCCL has it: late, open until received, and a rendezvous at the first use.

isend --> queue --(delay)--> read the memory as it is now --> gloo --> received: closed
"""

import queue
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.strict_device.job import Job, describe, is_object_collective, place
from tests.support.strict_device.marks import Marks


class Transfers:
    """All sends and receives of one rank."""

    def __init__(self, job: Job, marks: Marks) -> None:
        """Nothing is open."""
        self.job, self.marks = job, marks
        self.open: list[LateSend | Receive] = []
        self.communicators: set[str] = set()
        self.host_groups: set[str] = set()
        self.batched = 0
        self._queue: queue.Queue[LateSend] = queue.Queue()

    def install(self) -> None:
        """Put this between torch.distributed's functions and the process groups."""
        group, module = dist.ProcessGroup, dist.distributed_c10d
        self.real_send, self.real_recv = group.send, group.recv
        batch, new_group = module.batch_isend_irecv, module.new_group
        group.send = lambda pg, tensors, dst, tag=0: self.send(pg, tensors[0], dst, tag)  # type: ignore[method-assign,assignment]
        group.recv = lambda pg, tensors, src, tag=0: self.receive(pg, tensors[0], src, tag)  # type: ignore[method-assign,assignment]

        def batched(operations: list) -> list:
            self.batched += 1
            try:
                return batch(operations)
            finally:
                self.batched -= 1

        def noted(ranks: Any = None, timeout: Any = None, backend: Any = None, **more: Any) -> Any:
            made = new_group(ranks, timeout, backend, **more)
            if backend == "gloo" and isinstance(made, dist.ProcessGroup):
                self.host_groups.add(made.group_name)
            return made

        dist.batch_isend_irecv = module.batch_isend_irecv = batched
        dist.new_group = module.new_group = noted
        threading.Thread(target=self._transport, daemon=True).start()

    def send(self, group: Any, tensor: Tensor, peer: int, tag: int) -> "LateSend":
        """An isend's handle; the memory is read later."""
        self.job.raise_faults()
        send = LateSend(self, group, tensor, peer, tag)
        self.check(group, send.name, tensor)
        self._meet(send)
        self.open.append(send)
        self.job.report.num_sends += 1
        self._queue.put(send)
        return send

    def receive(self, group: Any, tensor: Tensor, peer: int, tag: int) -> "Receive":
        """An irecv's handle."""
        self.job.raise_faults()
        receive = Receive(self, group, tensor, peer, tag)
        self.check(group, receive.name, tensor)
        self._meet(receive)
        receive.work = self.real_recv(group, [tensor], peer, tag)
        self.open.append(receive)
        return receive

    def check(self, group: Any, name: str, tensor: Tensor) -> None:
        """Report what NCCL refuses: tensors with holes, or on the host and not moved by torch."""
        if not tensor.is_contiguous():
            self.job.fault(f"{name}: NCCL takes contiguous tensors only, not {tensor.stride()}")
        is_ours = group.group_name not in self.host_groups and self.marks.is_host(tensor)
        if is_ours and not is_object_collective():
            self.job.fault(f"{name}: NCCL has no tensors of the host, {describe(tensor)}")
        self.marks.check_ready(tensor, name)

    def synchronize(self) -> None:
        """Wait until everything open is received, as torch.cuda.synchronize does."""
        for transfer in list(self.open):
            transfer.finish(f"torch.cuda.synchronize at {place()} with an open ")

    def _meet(self, transfer: "LateSend | Receive") -> None:
        """Make the communicator: wait for its other ranks, as NCCL does at the first use.

        Batched operations use the group's communicator, others one of the pair alone.
        """
        if not self.job.options.rendezvous or transfer.group_name in self.host_groups:
            return
        ranks = transfer.group_ranks if self.batched else sorted({self.job.rank, transfer.peer})
        name = transfer.group_name
        if not self.batched:
            name += "/" + "-".join(map(str, ranks))
        if name in self.communicators:
            return
        until, entry = time.monotonic() + self.job.options.wait_s, f"strict/meet/{name}"
        self.job.store.set(f"{entry}/{self.job.rank}", transfer.name)
        missing = [rank for rank in ranks if rank != self.job.rank]
        with self.job.doing(f"first use of a communicator by {transfer.name}"):
            while missing := [
                r for r in missing if self.job.read(f"strict/meet/{name}/{r}") is None
            ]:
                if time.monotonic() > until:
                    self.job.fault(
                        f"{transfer.name} is the first use of the communicator of ranks {ranks} "
                        f"and blocks the host until ranks {missing} use it too; waited "
                        f"{self.job.options.wait_s:g} s; {self.job.others(missing)}"
                    )
                    break
                time.sleep(0.002)
        self.communicators.add(name)

    def _transport(self) -> None:
        while True:
            send = self._queue.get()
            time.sleep(max(0.0, send.due - time.monotonic()))
            send.post()


class _Transfer:
    """A handle as dist.Work's."""

    def __init__(self, owner: Transfers, group: Any, tensor: Tensor, peer: int, tag: int) -> None:
        self.owner, self.job = owner, owner.job
        self.group, self.group_name = group, group.group_name
        self.group_ranks = dist.get_process_group_ranks(group)
        self.peer_in_group, self.peer, self.tag = peer, self.group_ranks[peer], tag
        self.tensor = tensor  # held as torch's own handle holds it: the tensor, not its memory
        kind = "send to" if isinstance(self, LateSend) else "receive from"
        self.name = (
            f"{kind} rank {self.peer} of {describe(tensor)} in group {self.group_ranks} "
            f"at {place()}"
        )
        self.work: Any = None
        self.is_done = False

    def wait(self, timeout: object = None) -> bool:
        self.finish("")
        return True

    def is_completed(self) -> bool:
        return self.is_done

    def finish(self, why: str) -> None:
        if self.is_done:
            return
        self.before_wait()
        self.is_done = True  # gloo's handles cannot be waited for twice
        self.owner.open.remove(self)  # type: ignore[arg-type]
        self.job.wait(self.work, why + self.name, [self.peer])

    def before_wait(self) -> None: ...


class Receive(_Transfer):
    """An open irecv."""


class LateSend(_Transfer):
    """An open isend, whose memory is read when the transport comes to it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        storage = self.tensor.untyped_storage()
        self.memory = StorageWeakRef(storage)
        self.view = (self.tensor.dtype, self.tensor.storage_offset(), tuple(self.tensor.shape))
        with _disable_current_modes():
            self.promised = self.tensor.detach().clone(memory_format=torch.contiguous_format)
        self.due = time.monotonic() + self.job.options.send_ms / 1000
        self.posted = threading.Event()
        self.error: BaseException | None = None

    def post(self) -> None:
        """Hand the memory to gloo as it is now; freed memory is sent as NaN (integers: 0x55...)."""
        try:
            self.sent = self._look()
            if self.sent is None:
                poison = float("nan") if self.promised.is_floating_point() else 0x55
                self.sent = torch.full_like(self.promised, poison)
            self.work = self.owner.real_send(self.group, [self.sent], self.peer_in_group, self.tag)
        except BaseException as error:
            self.error = error
        self.posted.set()

    def before_wait(self) -> None:
        self._look()
        self.posted.wait()
        self._look()
        if self.error is not None:
            raise self.error
        self.job.raise_faults()

    def _look(self) -> Tensor | None:
        """The memory as a tensor, None if it was freed; a loss or a change is a fault."""
        storage = _strong(self.memory)
        if storage is None:
            self.job.fault(f"memory freed before wait(): {self.name}", may_raise=False)
            return None
        dtype, offset, shape = self.view
        with torch.no_grad(), _disable_current_modes():
            now = torch.empty(0, dtype=dtype).set_(storage, offset, shape)
            if not torch.equal(now.view(torch.uint8), self.promised.view(torch.uint8)):
                self.job.fault(f"memory changed before wait(): {self.name}", may_raise=False)
        return now


def _strong(memory: StorageWeakRef) -> torch.UntypedStorage | None:
    return torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
