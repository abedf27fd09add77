"""Contracts of kernels and collectives, and operations of flash attention counted by hand."""

from typing import Any

import pytest
import torch

from megatron_croc.rehearsal.kernels import flash_faults, flash_flops, triton_faults
from megatron_croc.rehearsal.recorder import nccl_refuses


class Kernel:
    """As much of a Triton kernel as the check looks at."""

    @staticmethod
    def fn(x, x_row, x_column, packed, length, BLOCK):
        """A kernel that reads x by its strides and packed without."""


def launched(**changes: Any) -> list[str]:
    x = torch.empty(4, 6, device="meta").t()
    arguments: dict[str, Any] = {"x": x, "row": x.stride(0), "column": x.stride(1)}
    arguments |= {"packed": torch.empty(6, 4, device="meta"), "length": 6}
    arguments |= changes
    grid, block = arguments.pop("grid", (6,)), arguments.pop("BLOCK", 8)
    faults = triton_faults(Kernel, grid, tuple(arguments.values()), {"BLOCK": block})
    return [fault for fault in faults if "on meta" not in fault]


def test_triton_launches() -> None:
    assert launched() == []
    with_gaps = torch.empty(4, 6, device="meta").t()
    assert "packed [6, 4] is not contiguous" in launched(packed=with_gaps)[0]
    assert "x [6, 4] is not contiguous" in launched(row=4, column=1)[0]
    assert "BLOCK = 6; it must be a power of two" in launched(BLOCK=6)
    assert "a grid of (0,)" in launched(grid=(0,))[0]
    assert "do not fit" in triton_faults(Kernel, (1,), (1, 2), {})[0]
    on_host = triton_faults(Kernel, (1,), (torch.empty(2), 1, torch.empty(2), 1, 1, 1), {})
    assert "x is on cpu; it must be on the GPU" in on_host


def flash_arguments(**changes: Any) -> tuple[Any, ...]:
    boundaries = torch.tensor([0, 3, 8], dtype=torch.int32)
    values: dict[str, Any] = {
        name: torch.empty(8, heads, 16, dtype=torch.bfloat16)
        for name, heads in (("query", 4), ("key", 2), ("value", 2))
    }
    values |= {"queries": boundaries, "keys": boundaries} | changes
    return tuple(values.values())


def test_flash_calls() -> None:
    name = "_flash_attention_forward"
    assert flash_faults(name, flash_arguments()) == []
    for changes, fault in (
        ({"query": torch.empty(8, 4, 16)}, "float32, bfloat16, bfloat16"),
        ({"queries": torch.tensor([0, 3, 8])}, "int64 on cpu; contiguous int32"),
        ({"key": torch.empty(8, 3, 16, dtype=torch.bfloat16)}, "4 query heads on 3 key heads"),
        ({"key": torch.empty(8, 16, 2, dtype=torch.bfloat16).transpose(1, 2)}, "not contiguous"),
    ):
        assert any(fault in found for found in flash_faults(name, flash_arguments(**changes)))
    wide = torch.empty(8, 4, 20, dtype=torch.bfloat16)
    assert "head dim 20" in flash_faults(name, flash_arguments(query=wide))[0]
    # Backward has the gradient before, the output and its log sums behind the three.
    q, k, v, *rest = flash_arguments(queries=torch.tensor([0, 8]))
    backward = (q, q, k, v, q, torch.empty(4, 8), *rest)
    assert "int64" in flash_faults("_flash_attention_backward", backward)[0]


def test_operations_of_flash_attention() -> None:
    """Visible pairs x 2 products x a multiply and an add x heads x head dim."""
    name, arguments = "_flash_attention_forward", flash_arguments()
    for boundary in arguments[3:]:
        boundary.host_value = boundary
    pairs = 3 * 4 // 2 + 5 * 6 // 2
    assert flash_flops(name, arguments) == 2 * 2 * pairs * 4 * 16
    # Queries fewer than keys: the last query sees all keys.
    fewer = torch.tensor([0, 2], dtype=torch.int32)
    more = torch.tensor([0, 5], dtype=torch.int32)
    fewer.host_value, more.host_value = fewer, more  # type: ignore[attr-defined]
    assert flash_flops(name, flash_arguments(queries=fewer, keys=more)) == 4 * (4 + 5) * 64
    assert flash_flops("mm", ()) is None


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(3), "float32 [3] is on cpu; NCCL takes tensors on the GPU only"),
        (torch.empty(3, dtype=torch.int16), "is on cpu"),
    ],
)
def test_tensors_that_nccl_refuses(tensor: torch.Tensor, reason: str) -> None:
    assert reason in str(nccl_refuses(tensor))


def test_tensors_on_a_device_that_nccl_refuses() -> None:
    class OnDevice(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_subclass(OnDevice)

    assert nccl_refuses(on_device(torch.empty(2, 3, dtype=torch.float64))) is None
    assert "not contiguous" in str(nccl_refuses(on_device(torch.empty(2, 3).t())))
    complex_numbers = on_device(torch.empty(2, dtype=torch.cfloat))
    assert "NCCL has no complex64" in str(nccl_refuses(complex_numbers))
