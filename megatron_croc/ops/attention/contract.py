"""Types shared by the flip, its flash kernels and its operations on positions."""

from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_croc.ops.flip_plan import CausalCall


class QKV(NamedTuple):
    """Queries, keys and values, or their gradients."""

    query: Tensor
    """[n, H, d]."""

    key: Tensor
    """[m, G, d]; G divides H."""

    value: Tensor
    """[m, G, d]."""


class FlashInputs(NamedTuple):
    """Arguments of one flash attention call; forward and backward take the same ones."""

    tensors: QKV
    """Queries, keys and values, in the order of `call`."""

    call: CausalCall
    """Pieces of the call."""

    softmax_scale: float
    """Factor of the scores."""


class FlashOutput(NamedTuple):
    """Result of attention, in the form that two results can be merged."""

    out: Tensor
    """[n, H, d]."""

    lse: Tensor
    """float32 [H, n], log-sum-exp of the scores, natural logarithm."""


class Flash(Protocol):
    """Forward and backward kernel of causal attention over the pieces of a call.

    Positions from call.num_queries (num_keys) on are left uninitialised, in outputs and in
    gradients. The caller sets them to zero.
    """

    @property
    def name(self) -> str:
        """Name for the log."""
        ...

    @property
    def distribution(self) -> str | None:
        """Package of the kernels, by its name in `libraries.KNOWN`; None: torch or this package."""
        ...

    def unsupported_reason(self, query: Tensor) -> str | None:
        """Reason against these kernels for tensors like `query`; None if they can be used."""
        ...

    def forward(self, inputs: FlashInputs) -> FlashOutput:
        """Attention of every query to the visible keys of its piece."""
        ...

    def backward(self, grad: Tensor, inputs: FlashInputs, output: FlashOutput) -> QKV:
        """Gradients of the inputs.

        Args:
            grad: [n, H, d], gradient of output.out, contiguous.
            inputs: arguments of the forward call.
            output: out and lse of the whole mask, which may have more keys than this call. The
                kernel computes its attention weights as exp(scores - lse).
        """
        ...


class PositionOps(Protocol):
    """Operations of the flip on some positions of a pack.

    `call.queries` or `call.keys` of None: the positions of the tensor in their own order.
    """

    @property
    def name(self) -> str:
        """Name for the log."""
        ...

    def gather(self, tensors: QKV, call: CausalCall) -> QKV:
        """Queries, keys and values of the call, in its order."""
        ...

    def merge(self, output: FlashOutput, more: FlashOutput, positions: Tensor) -> None:
        """Merge attention to further keys into `output` at some positions, in place.

        Args:
            output: out [n, H, d] and lse [H, n]. The merge is computed in the dtype of lse.
            more: out [r, H, d] and lse [H, r], for keys that `output` does not include.
            positions: int64 [r], distinct.
        """
        ...

    def gather_outputs(
        self, grad: Tensor, output: FlashOutput, positions: Tensor
    ) -> tuple[Tensor, FlashOutput]:
        """Part of the gradient [n, H, d] and of `output` at `positions` (int64 [r])."""
        ...

    def add(self, totals: QKV, parts: QKV, call: CausalCall) -> None:
        """Add gradients of gathered tensors to the gradients of their sources, in place."""
        ...
