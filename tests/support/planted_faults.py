"""Children of a rehearsal with faults planted in the code: `planted_faults.py AT_ONCE JOB ...`.

A job file of the name `rank_00001@missing_collective` gets that fault; it is planted in the fork of
that job alone.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
