"""Operations that pack Hugging Face tensors into one megatron-core tensor, and unpack it.

All are exact in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # `croc convert inspect` reads names and shapes without torch
    from torch import Tensor


class Operation(Protocol):
    """An exact, invertible change of representation."""

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Convert Hugging Face tensors to the whole megatron tensor."""
        ...

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """Convert the whole megatron tensor to Hugging Face tensors, in the same order."""
        ...


@dataclass(frozen=True)
class Copy:
    """One tensor, unchanged."""

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """[t] -> t."""
        (tensor,) = tensors
        return tensor

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """t -> [t]."""
        return [tensor]


@dataclass(frozen=True)
class Rows:
    """A table whose first rows are the tensor; megatron pads it to a multiple of the TP size."""

    num_rows: int
    """Rows of the Hugging Face tensor."""

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """[t] -> t, without padding (`state.py` adds it)."""
        (tensor,) = tensors
        return tensor

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """Drop the padding."""
        return [tensor[: self.num_rows]]


@dataclass(frozen=True)
class Stack:
    """Tensors stacked along rows: gate, then up."""

    num_parts: int = 2
    """Number of tensors, of equal numbers of rows."""

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate the rows."""
        import torch

        return torch.cat(list(tensors), dim=0)

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """Split into equal parts."""
        return list(tensor.chunk(self.num_parts, dim=0))


@dataclass(frozen=True, kw_only=True)
class GroupedQKV:
    """Interleaved query, key and value: for each query group its queries, key and value."""

    num_query_groups: int
    queries_per_group: int
    head_dim: int

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """[q, k, v], weights [rows, D] or biases [rows] -> interleaved rows."""
        import torch

        rest = tensors[0].shape[1:]
        grouped = [t.reshape(self.num_query_groups, -1, self.head_dim, *rest) for t in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """Interleaved rows -> [q, k, v]."""
        rest = tensor.shape[1:]
        heads = tensor.reshape(self.num_query_groups, -1, self.head_dim, *rest)
        parts = heads.split([self.queries_per_group, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in parts]


@dataclass(frozen=True)
class Reshape:
    """The same data in another shape."""

    megatron: tuple[int, ...]
    huggingface: tuple[int, ...]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Reshape to megatron's shape."""
        (tensor,) = tensors
        return tensor.reshape(self.megatron)

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """Reshape to Hugging Face's shape."""
        return [tensor.reshape(self.huggingface)]
