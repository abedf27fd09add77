"""The one file that decides which attention kernel runs."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megatron_croc.errors import ConfigError
from megatron_croc.ops.attention.dense import attend_dense
from megatron_croc.ops.mixed_mask import MixedMask


class AttentionBackend(Protocol):
    """Signature every backend has; see `attend`."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: MixedMask, *, softmax_scale: float
    ) -> Tensor:
        """Attend."""
        ...


_BACKENDS: dict[str, Callable[..., Tensor]] = {"dense": attend_dense}
_PREFERENCE = ("dense",)


def choose_backend(name: str = "auto") -> str:
    """Resolve `auto` to the fastest backend that runs here; refuse an unknown name."""
    if name == "auto":
        return next(candidate for candidate in _PREFERENCE if candidate in _BACKENDS)
    if name not in _BACKENDS:
        raise ConfigError(
            f"--attention-backend {name} is not known; choose auto or one of {', '.join(_BACKENDS)}"
        )
    return name


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    *,
    softmax_scale: float,
    backend: str = "auto",
) -> Tensor:
    """Attention over one packed row under a mixed mask.

    Args:
        query: [T, H, d], any floating dtype.
        key: [T, G, d]; G divides H (grouped-query attention).
        value: [T, G, d].
        mask: a mask of the same length T, on the same device.
        softmax_scale: factor of the scores, usually d ** -0.5.
        backend: auto, or a name that `choose_backend` knows.

    Returns:
        [T, H, d]; rows past cu_seqlens[-1] hold no meaning, but are finite.
    """
    return _BACKENDS[choose_backend(backend)](query, key, value, mask, softmax_scale=softmax_scale)
