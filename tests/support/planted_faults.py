"""Children of a rehearsal with faults planted in the code: `planted_faults.py AT_ONCE JOB ...`.

A job file of the name `rank_00001@missing_collective` gets that fault; it is planted in the fork of
that job alone.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_croc.rehearsal import rank


def device_mismatch() -> None:
    """A tensor of the host meets one of the device in the loss."""
    from megatron_croc.training import step

    real: Any = step._loss

    def loss(output: Any, **arguments: Any) -> Any:
        total, count, parts = real(output, **arguments)
        return total * torch.ones(3), count, parts

    step._loss = loss  # type: ignore[assignment]


def missing_collective() -> None:
    """This rank leaves out the sum of the labels over the replicas."""
    from megatron_croc.training import step

    step.all_reduce = lambda *_, **__: None  # type: ignore[assignment]


def channel_not_opened() -> None:
    """The target channel's first use lies inside the schedule."""
    from megatron_croc.parallel.target_channel import TargetChannel

    TargetChannel._connect = lambda self: None  # type: ignore[method-assign]


def wait_beside_an_open_send() -> None:
    """The pipeline waits for the whole device, while the target's send may be open."""
    from megatron_croc.parallel.pipeline import PipelineCommunicator

    real: Any = PipelineCommunicator._communicate

    def communicate(self: Any, **arguments: Any) -> Any:
        torch.cuda.synchronize()
        return real(self, **arguments)

    PipelineCommunicator._communicate = communicate  # type: ignore[method-assign]


def target_not_received() -> None:
    """The last stage makes up the target instead of receiving it."""
    from megatron_croc.parallel.target_channel import TargetChannel

    def get(self: Any, shape: Any, *, dtype: Any, device: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device=device)

    TargetChannel.get = get  # type: ignore[method-assign]


def both_send_first() -> None:
    """Two stages exchange a number outside a batch, each sending first."""
    from megatron_croc.training import step

    real: Any = step.measure_gradients

    def measure(*arguments: Any) -> Any:
        mine, other = torch.ones(1, device="cuda"), torch.empty(1, device="cuda")
        peer = 1 - dist.get_rank()
        dist.send(mine, dst=peer)
        dist.recv(other, src=peer)
        return real(*arguments)

    step.measure_gradients = measure  # type: ignore[assignment]


def host_tensor_to_nccl() -> None:
    """The counts are summed before they are moved to the device."""
    from megatron_croc.training import step

    step.to_device = lambda tensor: tensor  # type: ignore[assignment]


def strided_tensor_to_nccl() -> None:
    """The counts are a view with gaps."""
    from megatron_croc.training import step

    real: Any = step.all_reduce
    step.all_reduce = lambda counts, **about: real(counts.repeat(2)[::2], **about)  # type: ignore[assignment]


def strided_tensor_to_triton() -> None:
    """A kernel without strides among its arguments gets a transposed cost."""
    from megatron_croc.ops.assignment import on_gpu

    real: Any = on_gpu._kernel

    def kernel() -> Any:
        def launched(grid: Any) -> Any:
            def call(cost: Any, *others: Any, **options: Any) -> Any:
                return real()[grid](cost.transpose(1, 2), *others, **options)

            return call

        return type("Planted", (), {"__getitem__": staticmethod(launched)})()

    on_gpu._kernel = kernel  # type: ignore[assignment]


FAULTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant
    for plant in (
        device_mismatch,
        missing_collective,
        channel_not_opened,
        wait_beside_an_open_send,
        target_not_received,
        both_send_first,
        host_tensor_to_nccl,
        strided_tensor_to_nccl,
        strided_tensor_to_triton,
    )
}


def main() -> None:
    """Run the jobs, each with the fault that its name asks for."""
    real = rank._perform

    def perform(rehearse: Any, path: Path, recorder: Any) -> None:
        if (name := path.name.partition("@")[2]) in FAULTS:
            FAULTS[name]()
        real(rehearse, path, recorder)

    rank._perform = perform  # type: ignore[assignment]
    rank.main(int(sys.argv[1]), [Path(name) for name in sys.argv[2:]])


if __name__ == "__main__":
    main()
