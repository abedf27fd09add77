#!/usr/bin/env python
"""Difference of our pixels from those of Hugging Face processors, per format and decoder.

    python benchmarks/decode_parity.py

    llava    LlavaImageProcessor(do_pad=True), 336      our `pad`
    clip     CLIPImageProcessor, 336                    our `square`
    siglip   expand2square (grey 127), then SiglipImageProcessor, 384     our `pad`

Theirs come from PIL, with `convert("RGB")` first as in LLaVA; they are taken back from normalised
floats to 8-bit levels, so that the normalisation's constants are compared too. Needs transformers.
"""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_croc.data.sample.decode import DecoderName, ImageDecoder
from megatron_croc.data.sample.image_transform import ImageTransform

RESULTS = Path(__file__).parent / "results"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
DECODERS: tuple[DecoderName, ...] = ("dali", "pil")


def photo(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and grain."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), 3)).astype(np.int16)
    smooth[height // 3 : height // 2, width // 4 : width // 2] = (230, 40, 40)
    grain = generator.integers(-12, 13, (height, width, 3))
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """One file of each kind."""
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter; the released code does not turn it
    grey = np.asarray(photo().convert("L"))
    alpha = photo().convert("RGBA")
    alpha.putalpha(Image.fromarray(grey))
    return {
        "photo, JPEG 4:2:0": encode(photo(), "JPEG", quality=90),
        "photo, JPEG 4:4:4": encode(photo(), "JPEG", quality=90, subsampling=0),
        "photo, progressive": encode(photo(), "JPEG", progressive=True),
        "photo, upright": encode(photo(241, 333), "JPEG", quality=90),
        "photo, PNG": encode(photo(), "PNG"),
        "photo, WebP": encode(photo(), "WEBP"),
        "grey JPEG": encode(photo().convert("L"), "JPEG"),
        "palette PNG": encode(photo().convert("P"), "PNG"),
        "palette GIF": encode(photo().convert("P"), "GIF"),
        "CMYK JPEG": encode(photo().convert("CMYK"), "JPEG"),
        "EXIF-rotated JPEG": encode(photo(), "JPEG", exif=exif),
        "PNG with alpha": encode(alpha, "PNG"),
        "1 x 1": encode(Image.new("RGB", (1, 1), (200, 30, 90)), "PNG"),
    }


@cache
def references() -> dict[str, tuple[Callable[[Image.Image], torch.Tensor], ImageTransform]]:
    """(their processing, in levels [3, s, s]; our transform) by name."""
    from transformers import (
        CLIPImageProcessorPil,
        LlavaImageProcessorPil,
        SiglipImageProcessorPil,
    )

    edge, square = {"shortest_edge": 336}, {"height": 336, "width": 336}
    llava = LlavaImageProcessorPil(do_pad=True, size=edge, crop_size=square)
    clip = CLIPImageProcessorPil(size=edge, crop_size=square)
    siglip = SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=3)

    def levels(processor: Any, mean: tuple, std: tuple) -> Callable[[Image.Image], torch.Tensor]:
        scale, shift = (torch.tensor(x)[:, None, None] * 255 for x in (std, mean))

        def process(image: Image.Image) -> torch.Tensor:
            pixels = processor(image, return_tensors="pt")["pixel_values"][0]
            return pixels * scale + shift

        return process

    padded = levels(siglip, SIGLIP_MEAN, SIGLIP_STD)
    clip_fill = tuple(int(mean * 255) for mean in CLIP_MEAN)
    return {
        "llava": (
            levels(llava, CLIP_MEAN, CLIP_STD),
            ImageTransform(img_size=336, aspect_ratio="pad", fill=clip_fill),  # type: ignore[arg-type]
        ),
        "clip": (
            levels(clip, CLIP_MEAN, CLIP_STD),
            ImageTransform(img_size=336, aspect_ratio="square", fill=clip_fill),  # type: ignore[arg-type]
        ),
        "siglip": (
            lambda image: padded(expand_to_square(image)),
            ImageTransform(img_size=384, aspect_ratio="pad", fill=(127, 127, 127)),
        ),
    }


def expand_to_square(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square with SigLIP's grey."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), (127, 127, 127))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def compare(encoded: bytes, reference: str, decoder: DecoderName) -> tuple[float, float]:
    """(largest, mean) difference, 8-bit levels."""
    process, transform = references()[reference]
    expected = process(Image.open(io.BytesIO(encoded)).convert("RGB"))
    (found,) = ImageDecoder(transform, decoder).decode([encoded])
    assert isinstance(found, torch.Tensor), found
    error = (found.float() - expected).abs()
    return round(error.max().item(), 3), round(error.mean().item(), 4)


def main() -> None:
    """Print the table and keep it."""
    names = [f"{r}/{d}" for r in references() for d in DECODERS]
    rows = {
        kind: {name: compare(data, *name.split("/")) for name in names}  # type: ignore[arg-type]
        for kind, data in images().items()
    }
    print(f"{'largest / mean, levels':<24}" + "".join(f"{name:>16}" for name in names))
    for kind, row in rows.items():
        print(f"{kind:<24}" + "".join(f"{row[n][0]:>8.1f} /{row[n][1]:>6.3f}" for n in names))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decode_parity.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
