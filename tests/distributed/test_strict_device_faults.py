"""The strict stand-in sees each of the faults that it is for, and leaves lawful code alone."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_croc.parallel.device import beside, current_device
from megatron_croc.parallel.groups import start_torch
from tests.support.distributed import run_distributed
from tests.support.strict_device import Options, Report, run_strict
from tests.support.synthetic import tiny_run

pytestmark = pytest.mark.distributed


def run(function: Callable[[], Any], size: int, **options: Any) -> list[tuple[Any, Report]]:
    return run_distributed(run_strict, size, Options(**options), function)


def on_device(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=current_device())


def join() -> int:
    start_torch(tiny_run().parallel)
    return dist.get_rank()


def leave_one_out() -> None:
    rank = join()
    if rank == 0:
        dist.all_reduce(on_device(3))
    dist.broadcast(on_device(2, 2), 0)


def never_come() -> None:
    if join() == 0:
        dist.all_reduce(on_device(3))
    else:
        time.sleep(4)


def reduce_another_shape() -> None:
    dist.all_reduce(on_device(3 + join()))


def reduce_in_another_way() -> None:
    dist.all_reduce(on_device(3), op=(dist.ReduceOp.SUM, dist.ReduceOp.MAX)[join()])


def reduce_another_dtype() -> None:
    dist.all_reduce(on_device(3).to((torch.float32, torch.float64)[join()]))


def reduce_on_the_host() -> None:
    join()
    dist.all_reduce(torch.ones(3))


def send_with_holes() -> None:
    if join() == 0:
        dist.send(on_device(4, 6).t(), 1)
    else:
        dist.recv(on_device(6, 4), 0)


def wait_for_the_device_with_an_open_send() -> None:
    """Rank 1 takes what was sent only after rank 0 is done waiting."""
    rank = join()
    if rank == 0:
        dist.send(on_device(1), 1)
        open_send = dist.isend(on_device(5), 1)
        torch.cuda.synchronize()
        dist.barrier()
        open_send.wait()
    else:
        dist.recv(on_device(1), 0)
        dist.barrier()
        dist.recv(on_device(5), 0)


def send_to_nobody() -> None:
    if join() == 0:
        dist.isend(on_device(5), 1)
    else:
        time.sleep(4)


def move_meta() -> None:
    torch.empty(3, device="meta").cuda()


def mix() -> None:
    torch.ones(3) * on_device(3)


def index_the_host_by_the_device() -> None:
    torch.ones(3)[torch.zeros(2, dtype=torch.int64, device="cuda")]


def read_as_numpy() -> None:
    on_device(3).numpy()


@pytest.mark.parametrize(
    ("function", "size", "message"),
    [
        (leave_one_out, 2, r"collective 0 of group \[0, 1\] differs: .*allreduce.*broadcast|"
         r"collective 0 of group \[0, 1\] differs: .*broadcast.*allreduce"),
        (never_come, 2, r"rank 0: allreduce\(\[3\] float32.*faults.py:\d+ waited 3 s; rank 1: at "
         r".*faults.py:\d+"),
        (reduce_another_shape, 2, r"differs: allreduce\(\[\d\] float32.*allreduce\(\[\d\] float"),
        (reduce_in_another_way, 2, "differs: allreduce.*(SUM.*MAX|MAX.*SUM)"),
        (reduce_another_dtype, 2, r"differs: allreduce\(\[3\] float\d\d.*allreduce\(\[3\] float\d"),
        (reduce_on_the_host, 2, r"allreduce at .*faults.py:\d+: NCCL has no tensors of the host"),
        (send_with_holes, 2, r"send to rank 1 of \[6, 4\] .*NCCL takes contiguous tensors only"),
        (
            wait_for_the_device_with_an_open_send,
            2,
            r"rank 0: torch.cuda.synchronize at .*faults.py:\d+ with an open send to rank 1 of "
            r"\[5\] float32 .* waited 3 s; rank 1: barrier|barrier.* rank 0: torch.cuda.synchr",
        ),
        (
            send_to_nobody,
            2,
            r"rank 0: send to rank 1 of \[5\] .* is the first use of the communicator of ranks "
            r"\[0, 1\] .* until ranks \[1\] use it too; waited 3 s; rank 1: at .*faults.py:\d+",
        ),
        (move_meta, 1, "Cannot copy out of meta tensor"),
        (mix, 1, r"mul.* mixes the device's \[3\] float32 with the host's \[3\] float32"),
        (index_the_host_by_the_device, 1, "index.* mixes the device's"),
        (read_as_numpy, 1, r"numpy\(\) of the device's \[3\] float32 at .*faults.py"),
    ],
)  # fmt: skip
def test_a_fault_is_named(function: Callable[[], None], size: int, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run(function, size, wait_s=3)


def meet_late() -> list[float]:
    """Seconds of an isend whose receiver comes late, at the pair's first use and at its second."""
    rank = join()
    seconds = []
    for _ in range(2):
        if rank == 1:
            time.sleep(0.5)
            dist.recv(on_device(1), 0)
            continue
        started = time.monotonic()
        work = dist.isend(on_device(1), 1)
        seconds.append(time.monotonic() - started)
        assert work is not None
        work.wait()
    return seconds


def test_only_the_first_use_of_a_pair_waits_for_the_peer() -> None:
    ((first, second), _), _ = run(meet_late, 2)
    assert first > 0.4
    assert second < 0.3


def change_what_is_sent() -> float:
    rank = join()
    if rank == 0:
        tensor = on_device(4)
        work = dist.isend(tensor, 1)
        assert work is not None
        tensor.fill_(7.0)
        work.wait()
        return 0.0
    got = on_device(4)
    dist.recv(got, 0)
    return got[0].item()


def test_memory_changed_while_it_is_sent_is_named_and_arrives_changed() -> None:
    (_, sender), (got, _) = run(change_what_is_sent, 2, raise_faults=False)
    assert got == 7.0
    assert re.search(r"memory changed before wait\(\): send to rank 1 of \[4\]", sender.faults[0])


def copy_beside() -> tuple[float, float]:
    """Values that the host reads too early, and after the wait."""
    with beside() as side:
        host = side.to_host(on_device(3) * 2)
    early = float(host[0])
    side.wait_on_host()
    side.wait_on_device()
    return early, float(host[0])


def test_a_copy_to_the_host_is_late() -> None:
    [((early, late), report)] = run(copy_beside, 1, raise_faults=False, copy_ms=200)
    assert early != early  # NaN
    assert late == 2.0
    assert "reads before it is there: copy to the host of [3] float32" in report.faults[0]
    assert not report.host_reads


class ReadsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * grads[0].sum().item()


def read_values() -> None:
    host = torch.arange(6.0)
    _ = host.tolist(), float(host[1]), host[host > 2], torch.nonzero(host), host.to("cpu")
    x = host.to(current_device())
    _ = float(x[1]), int(x[2]), bool(x.any()), x[3].item()
    _ = x.tolist(), x.cpu(), x.to("cpu"), torch.nonzero(x), torch.bincount(x.long()), x[x > 2]
    x[x > 2] = 0.0
    host.copy_(x)
    weight = x.detach().requires_grad_()
    ReadsBackward.apply(weight).sum().backward()


def test_reads_of_device_values_are_counted_with_their_place() -> None:
    [(_, report)] = run(read_values, 1)
    place = "at tests/distributed/test_strict_device_faults.py"
    assert report.host_reads == {
        f"item {place} read_values": 4,
        f"tolist {place} read_values": 1,
        f"cpu {place} read_values": 2,
        f"nonzero {place} read_values": 1,
        f"bincount {place} read_values": 1,
        f"boolean mask {place} read_values": 1,
        f"copy_ to the host {place} read_values": 1,
        f"item {place} backward": 1,
    }


def synchronize() -> None:
    torch.cuda.synchronize()


def test_synchronizes_are_counted_with_their_place() -> None:
    [(_, report)] = run(synchronize, 1)
    [(place, count)] = report.synchronizes.items()
    assert re.fullmatch(r"tests/distributed/test_strict_device_faults.py:\d+", place)
    assert count == 1


def exchange_lawfully() -> list[float]:
    """Both ways at once, batched and not, objects, groups of the host, coalesced collectives."""
    rank = join()
    peer = 1 - rank
    out, into = on_device(3) * rank, on_device(3)
    operations = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    works = [dist.isend(out, peer), dist.irecv(into, peer)]
    for work in works:
        assert work is not None
        work.wait()
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, {"rank": rank})
    on_host = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(2), group=on_host)
    with dist._coalescing_manager(async_ops=True) as manager:
        dist.all_reduce(into)
        dist.all_reduce(out)
    manager.wait()
    torch.cuda.synchronize()
    return into.tolist()


def test_lawful_code_has_no_faults() -> None:
    for values, report in run(exchange_lawfully, 2):
        assert values == [1.0] * 3
        assert report.faults == []
        assert report.num_sends == 2
