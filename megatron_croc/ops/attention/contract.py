"""What a flash kernel takes and gives: the seam between the flip and the kernels it stands on."""

from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_croc.ops.flip_plan import CausalCall


class QKV(NamedTuple):
    """Queries, keys and values, or the gradients of them."""

    query: Tensor
    """[n, H, d]."""

    key: Tensor
    """[m, G, d]; G divides H."""

    value: Tensor
    """[m, G, d]."""


class Flash(Protocol):
    """A pair of kernels: causal attention over the pieces of a call, one way and back.

    Rows at and past call.num_queries (num_keys) are left uninitialised, in outputs and gradients:
    the caller zeroes them.
    """

    @property
    def name(self) -> str:
        """What the log calls it."""
        ...

    @property
    def distribution(self) -> str | None:
        """The package it comes from, by its name in `libraries.KNOWN`; None: torch or this one."""
        ...

    def fault(self, query: Tensor) -> str | None:
        """Why the kernels cannot run on tensors like `query`; None when they can."""
        ...

    def forward(self, inputs: QKV, call: CausalCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """Out [n, H, d] and lse [H, n], float32, natural logarithm."""
        ...

    def backward(
        self,
        grad: Tensor,
        inputs: QKV,
        out: Tensor,
        lse: Tensor,
        call: CausalCall,
        softmax_scale: float,
    ) -> QKV:
        """Gradients of the inputs, for weights exp(scores - lse) and output `out`."""
        ...
