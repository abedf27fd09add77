"""Made-up images and conversations for the tests of the data layer."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_croc.data.prepare.lengths import index_lengths


def jpeg(seed: int) -> bytes:
    """A smooth random image."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((50 + seed % 7, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def conversation(number: int, num_images: int) -> list[dict]:
    """One question with marks, one answer."""
    question = "<image>\n" * num_images + f"what is number {number} ?"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"a thing {number}"}]


def measure_lengths(folder: str, tokenizer_model: str, template: str = "v1") -> int:
    """Write a dataset folder's table of lengths; return the number of samples measured."""
    done = index_lengths(
        Path(folder),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=tokenizer_model,
        template=template,
    )
    return sum(done)
