"""Sizes on each rank that Transformer Engine's fp8 matrix products accept."""

from megatron_croc.config.run import RunConfig

_UNIT = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
_BLOCK = 128


def fp8_unit(run: RunConfig) -> int:
    """Divisor of both dimensions of every matrix."""
    return _UNIT[run.training.fp8_recipe]


def fp8_gathered_unit(run: RunConfig) -> int:
    """Divisor of both dimensions of the matrices that sequence parallelism gathers.

    Those are a rank's hidden states [S, D]; `blockwise` gathers whole blocks.
    """
    blocks = run.training.fp8_recipe == "blockwise" and run.parallel.sequence_parallel
    return _BLOCK if blocks else fp8_unit(run)
