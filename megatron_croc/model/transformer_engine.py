"""Optional linear layers of Transformer Engine (TE).

TE fuses each norm with the linear layer that follows it and can compute matrix products in fp8.
TE's attention is not used; the core attention is in ops/attention. Not run on a GPU so far;
tests/libraries runs TE's Python code with a substitute for its extension module.
"""

import functools
from typing import Literal, NamedTuple

from megatron_croc.config.training import TrainingConfig
from megatron_croc.errors import ConfigError, first_line
from megatron_croc.libraries import name_unknown_version
from megatron_croc.parallel.device import has_cuda

Implementation = Literal["local", "te"]
"""local: linear layers of megatron-core and `model.norm.Norm`. te: layers of Transformer Engine."""

FIRST_ARCHITECTURE = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""fp8_recipe -> lowest compute capability of the GPU (source: TE's documentation of recipes)."""


class LinearModules(NamedTuple):
    """Wrappers of TE layers in megatron-core."""

    norm: type
    """TENorm."""

    norm_column: type
    """TELayerNormColumnParallelLinear."""

    row: type
    """TERowParallelLinear."""


def resolve_transformer_impl(training: TrainingConfig) -> Implementation:
    """Return the implementation of the layers on this machine.

    Raises:
        ConfigError: Transformer Engine is required and does not work here.
    """
    wanted = training.transformer_impl
    if wanted == "local":
        return "local"
    reason = te_unsupported_reason()
    if reason is None:
        name_unknown_version("transformer-engine")
        return "te"
    if wanted == "te" or training.fp8_format is not None:
        setting = "transformer_impl=te" if wanted == "te" else f"fp8_format={training.fp8_format}"
        raise ConfigError(
            f"{setting}: {reason}; use the NGC image (Dockerfile.ngc), or set "
            "transformer_impl=local and no fp8_format"
        )
    return "local"


@functools.cache
def te_unsupported_reason() -> str | None:
    """Reason that Transformer Engine cannot be used here; None if it can."""
    if not has_cuda():
        return "Transformer Engine needs a GPU and there is none"
    try:
        linear_modules()
    except Exception as error:  # a package built for another torch may raise any error
        return f"Transformer Engine does not import ({first_line(error)})"
    return None


def linear_modules() -> LinearModules:
    """Import the layers.

    Raises:
        ImportError: Transformer Engine is not installed.
    """
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ImportError("transformer_engine is not installed")
    return LinearModules(te.TENorm, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear)


def fp8_settings(training: TrainingConfig) -> dict:
    """Fields of megatron's TransformerConfig that turn on fp8 in the language model."""
    if training.fp8_format is None:
        return {}
    return {
        "fp8": training.fp8_format,
        "fp8_recipe": training.fp8_recipe,
        "first_last_layers_bf16": training.first_last_layers_bf16,
    }
