"""Header of an encoded image: format and size, and the shapes that training refuses.

Read without torch, which the processes of preprocessing need not import.
"""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image, UnidentifiedImageError

from megatron_croc.errors import first_line

MAX_IMAGE_PIXELS = 89_478_485
"""Largest number of pixels (PIL's limit, 256 MiB as RGB); a header may claim 65500 x 65500."""


LARGEST_IMG_SIZE = 384
"""Largest img_size of the recipes, pixels; preprocessing does not know that of the run."""

_PNG_BITS_AT = 24
"""Byte of a PNG that says the bits of a level."""

FORMATS_OF_16_BITS = frozenset({"PNG", "PPM", "JPEG2000"})
"""Formats whose mode I holds 16-bit levels (in a TIFF it holds 32-bit ones)."""


class ImageError(ValueError):
    """Error of an image that cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """Format, mode and size of an encoded image, read without decoding it."""

    format: str
    """PIL's name of the format: JPEG, PNG, ..."""

    mode: str
    """PIL's pixel mode: RGB, L, P, I;16, ..."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    bits: int = 8
    """Bits of a level in a PNG, whose mode may be RGB with 16; else 8."""


def read_header(encoded: bytes) -> ImageHeader:
    """Read format, mode and size of an encoded image.

    Raises:
        ImageError: not an image, or larger than MAX_IMAGE_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"image too large: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image: {len(encoded)} bytes of no known format") from error
    except Exception as error:  # on malformed bytes PIL's plugins raise any exception
        raise ImageError(f"not a readable image: {first_line(error)}") from error
    if not (image.width and image.height):
        raise ImageError(f"image of {image.width} x {image.height} pixels is empty")
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ImageError(
            f"image of {image.width} x {image.height} pixels; at most {MAX_IMAGE_PIXELS} are read"
        )
    if image.mode == "F" or (image.mode == "I" and image.format not in FORMATS_OF_16_BITS):
        raise ImageError(
            f"image of 32-bit levels ({image.format}, mode {image.mode}), which have no stated "
            "range: save it with 8 or 16 bits"
        )
    return ImageHeader(
        format=image.format or "",
        mode=image.mode,
        width=image.width,
        height=image.height,
        bits=encoded[_PNG_BITS_AT] if image.format == "PNG" else 8,
    )


def check_shape(
    width: int,
    height: int,
    aspect_ratio: Literal["pad", "square"],
    img_size: int = LARGEST_IMG_SIZE,
) -> None:
    """Refuse an image that training would refuse for its shape; preprocessing asks too.

    Args:
        width: pixels.
        height: pixels.
        aspect_ratio: geometry, as in ImageTransform.
        img_size: height and width of the result, pixels.

    Raises:
        ImageError: an empty image, or one whose canvas (`pad`: the square of its longer side) or
            resized form (`square`) exceeds MAX_IMAGE_PIXELS.
    """
    long, short = max(width, height), min(width, height)
    if not short:
        raise ImageError(f"image of {width} x {height} pixels is empty")
    pixels = long * long if aspect_ratio == "pad" else img_size * int(img_size * long / short)
    if max(pixels, width * height) > MAX_IMAGE_PIXELS:
        raise ImageError(
            f"image of {width} x {height} pixels is too long and thin: {aspect_ratio} would need "
            f"{pixels} pixels, at most {MAX_IMAGE_PIXELS} are made"
        )
