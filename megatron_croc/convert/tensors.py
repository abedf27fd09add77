"""How one megatron-core tensor is made of Hugging Face tensors, and taken apart again.

Every operation is exact in both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Operation(Protocol):
    """An exact, invertible change of representation."""

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors -> the whole megatron tensor."""
        ...

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """The whole megatron tensor -> Hugging Face tensors, in the same order."""
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
        """[t] -> t; padding is added where the target shape is known."""
        (tensor,) = tensors
        return tensor

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """Drop the padding."""
        return [tensor[: self.num_rows]]


@dataclass(frozen=True)
class Stack:
    """Several tensors one below the other: gate above up."""

    num_parts: int = 2
    """How many, all of the same number of rows."""

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate the rows."""
        return torch.cat(list(tensors), dim=0)

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """Cut into equal parts."""
        return list(tensor.chunk(self.num_parts, dim=0))


@dataclass(frozen=True, kw_only=True)
class GroupedQKV:
    """query, key, value -> for each query group its queries, its key, its value."""

    num_query_groups: int
    queries_per_group: int
    head_dim: int

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """[q, k, v], weights [rows, h] or biases [rows] -> the interleaved rows."""
        rest = tensors[0].shape[1:]
        grouped = [t.reshape(self.num_query_groups, -1, self.head_dim, *rest) for t in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """The interleaved rows -> [q, k, v]."""
        rest = tensor.shape[1:]
        heads = tensor.reshape(self.num_query_groups, -1, self.head_dim, *rest)
        parts = heads.split([self.queries_per_group, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in parts]


@dataclass(frozen=True)
class Reshape:
    """The same numbers in another shape."""

    megatron: tuple[int, ...]
    huggingface: tuple[int, ...]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """To megatron's shape."""
        (tensor,) = tensors
        return tensor.reshape(self.megatron)

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """To Hugging Face's shape."""
        return [tensor.reshape(self.huggingface)]
