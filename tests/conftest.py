"""Fixtures shared by every test."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Recorded runs of the released Croc and ViCToR code; kept outside the project."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = Path(os.environ.get("CROC_GOLDEN_DIR", beside))
    if not folder.is_dir():
        pytest.skip(f"no recorded reference runs at {folder}; set CROC_GOLDEN_DIR")
    return folder
