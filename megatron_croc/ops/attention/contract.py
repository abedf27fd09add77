"""What flash kernels and row operations take and give: the seam between the flip and them."""

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

    def unsupported_reason(self, query: Tensor) -> str | None:
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


class Rows(Protocol):
    """The four operations. `call.queries` and `call.keys` of None mean rows in their own order."""

    @property
    def name(self) -> str:
        """What the log calls it."""
        ...

    def gather(self, inputs: QKV, call: CausalCall) -> QKV:
        """The rows the call reads, in the order it reads them."""
        ...

    def merge(self, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, rows: Tensor) -> None:
        """Fold attention to further keys into some rows of (out, lse), in place.

        Args:
            out: [n, H, d].
            lse: [H, n], in the dtype the merge is computed in.
            more: [r, H, d], attention of the rows `rows` (int64 [r]) to keys that out has not seen.
            more_lse: [H, r].
            rows: without repetition.
        """
        ...

    def gather_outputs(
        self, grad: Tensor, out: Tensor, lse: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows `rows` (int64 [r]) of grad [n, H, d], out [n, H, d] and lse [H, n]."""
        ...

    def add(self, totals: QKV, shares: QKV, call: CausalCall) -> None:
        """Add the gradients of what the call read to those of what it was gathered from."""
        ...
