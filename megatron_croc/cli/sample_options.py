"""Options that describe the samples of a run, the same for every command that estimates memory."""

import argparse
from pathlib import Path

from megatron_croc.config.run import RunConfig
from megatron_croc.planning.workload import Workload, from_numbers, from_shards


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Add --text-tokens, --text-spread, --images and --shards."""
    add = parser.add_argument
    add("--text-tokens", type=float, default=200.0, help="mean of a sample (default 200)")
    add("--text-spread", type=float, default=0.5, help="sd of the log of it (default 0.5)")
    add("--images", type=float, default=1.0, help="mean of a sample (default 1)")
    add("--shards", type=Path, help="dataset folder to take samples from instead")


def read_workload(options: argparse.Namespace, run: RunConfig) -> Workload:
    """Build the distribution of sample lengths that the options describe.

    Raises:
        ConfigError: a number out of range.
        DataError: --shards is not a finished dataset.
    """
    if options.shards is not None:
        return from_shards(run, options.shards)
    return from_numbers(
        run, text_tokens=options.text_tokens, images=options.images, spread=options.text_spread
    )


def sample_flags(options: argparse.Namespace) -> str:
    """Write the options as flags, for a message or another command."""
    if options.shards is not None:
        return f"--shards {options.shards}"
    return (
        f"--text-tokens {options.text_tokens:g} --text-spread {options.text_spread:g} "
        f"--images {options.images:g}"
    )
