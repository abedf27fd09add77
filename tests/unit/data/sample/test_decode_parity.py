"""Pixels against the Hugging Face processors, for every kind of file."""

import pytest

from benchmarks.decode_parity import compare, images

MAX_LEVELS = 2.01
"""torch's resize and PIL's round at different places; floats come back with a small error."""

IMAGES = images()


@pytest.mark.parametrize("decoder", ["dali", "pil"])
@pytest.mark.parametrize("reference", ["llava", "clip", "siglip"])
def test_within_two_levels_of_transformers(reference, decoder):
    pytest.importorskip("transformers")
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    errors = {kind: compare(data, reference, decoder) for kind, data in IMAGES.items()}
    assert max(largest for largest, _ in errors.values()) <= MAX_LEVELS, errors
    assert max(mean for _, mean in errors.values()) <= 0.05, errors
