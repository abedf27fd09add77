"""Transformer Engine's linear layers, when they are wanted and there.

TE fuses each norm with the linear layer behind it and can run the matrix products in fp8. Its
attention is never used: the core attention is ours (ops/attention). Nothing here has been run on a
GPU so far; tests/libraries runs Transformer Engine's own Python over a made-up extension.
"""

import functools
from typing import Literal, NamedTuple

from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError, first_line
from megatron_croc.libraries import name_unknown_version
from megatron_croc.parallel.device import has_cuda

Implementation = Literal["local", "te"]
"""local: megatron-core's own layers and our norm. te: Transformer Engine's."""

FIRST_ARCHITECTURE = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""fp8_recipe -> lowest compute capability of the GPU (TE's documentation of its recipes)."""


class LinearModules(NamedTuple):
    """megatron-core's wrappers of TE layers."""

    norm: type
    """TENorm."""

    norm_column: type
    """TELayerNormColumnParallelLinear."""

    row: type
    """TERowParallelLinear."""


def resolve_transformer_impl(run: RunConfig) -> Implementation:
    """The layers `run` is built of on this machine.

    Raises:
        ConfigError: Transformer Engine is asked for and does not work here.
    """
    wanted = run.training.transformer_impl
    if wanted == "local":
        return "local"
    reason = te_unsupported_reason()
    if reason is None:
        name_unknown_version("transformer-engine")
        return "te"
    if wanted == "te" or run.training.fp8_format is not None:
        setting = (
            "transformer_impl=te" if wanted == "te" else f"fp8_format={run.training.fp8_format}"
        )
        raise ConfigError(
            f"{setting}: {reason}; use the NGC image (Dockerfile.ngc), or set "
            "transformer_impl=local and no fp8_format"
        )
    return "local"


@functools.cache
def te_unsupported_reason() -> str | None:
    """Why Transformer Engine cannot be used here; None when it can."""
    if not has_cuda():
        return "Transformer Engine needs a GPU and there is none"
    try:
        linear_modules()
    except Exception as error:  # a package built for another torch fails in any way it likes
        return f"Transformer Engine does not import ({first_line(error)})"
    return None


def linear_modules() -> LinearModules:
    """The layers.

    Raises:
        ImportError: Transformer Engine is not installed.
    """
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ImportError("transformer_engine is not installed")
    return LinearModules(te.TENorm, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear)


def fp8_settings(run: RunConfig) -> dict:
    """Fields of megatron's TransformerConfig that turn fp8 on in the language model."""
    training = run.training
    if training.fp8_format is None:
        return {}
    return {
        "fp8": training.fp8_format,
        "fp8_recipe": training.fp8_recipe,
        "first_last_layers_bf16": training.first_last_layers_bf16,
    }
