"""Sizes on each rank that Transformer Engine's fp8 matrix products accept."""

from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.config.training import TrainingConfig

_UNIT = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
_BLOCK = 128


def fp8_unit(training: TrainingConfig) -> int:
    """Divisor of both dimensions of every matrix."""
    return _UNIT[training.fp8_recipe]


def fp8_gathered_unit(training: TrainingConfig, parallel: ParallelConfig) -> int:
    """Divisor of both dimensions of the matrices that sequence parallelism gathers.

    Those are a rank's hidden states [S, D]; `blockwise` gathers whole blocks.
    """
    blocks = training.fp8_recipe == "blockwise" and parallel.sequence_parallel
    return _BLOCK if blocks else fp8_unit(training)
