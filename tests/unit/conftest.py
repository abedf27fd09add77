"""Fixtures for tests of single modules."""

import pytest


@pytest.fixture
def pg_collection():
    """megatron's process groups of a world of one, in this process."""
    from megatron_croc.config.parallel import ParallelConfig
    from megatron_croc.parallel.groups import start_distributed, stop_distributed

    yield start_distributed(ParallelConfig(), seed=1)
    stop_distributed()
