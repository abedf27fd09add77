"""Options and fixtures shared by every test."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of our own."""
    group = parser.getgroup("megatron_croc")
    group.addoption(
        "--strict-device",
        action="store_true",
        help="run every job of tests/support/distributed.py with the manners of CUDA and NCCL",
    )
    group.addoption(
        "--strict-device-ms",
        type=float,
        default=20.0,
        help="delay of sends and of copies to the host under --strict-device (default 20)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put all jobs under the strict stand-in, if asked to."""
    if not config.getoption("--strict-device"):
        return
    from tests.support import distributed
    from tests.support.strict_device import Options

    delay = config.getoption("--strict-device-ms")
    distributed.strict = Options(send_ms=delay, copy_ms=delay)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Recorded runs of the released Croc and ViCToR code."""
    return Path(__file__).parent / "golden" / "cases"
