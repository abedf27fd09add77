"""Sizes that Transformer Engine's fp8 products take, on each rank."""

from megatron_croc.config.run import RunConfig

_UNIT = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
_BLOCK = 128


def fp8_unit(run: RunConfig) -> int:
    """What both sides of every matrix must be multiples of."""
    return _UNIT[run.training.fp8_recipe]


def fp8_gathered_unit(run: RunConfig) -> int:
    """What both sides of the matrices must be multiples of that sequence parallelism gathers.

    Those are a rank's rows of the hidden states; `blockwise` gathers whole blocks.
    """
    blocks = run.training.fp8_recipe == "blockwise" and run.parallel.sequence_parallel
    return _BLOCK if blocks else fp8_unit(run)
