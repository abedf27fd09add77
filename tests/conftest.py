"""Fixtures shared by every test."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Recorded runs of the released Croc and ViCToR code."""
    return Path(__file__).parent / "golden" / "cases"
