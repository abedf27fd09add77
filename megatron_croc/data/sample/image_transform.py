"""Transform an image of any shape to img_size x img_size pixels; reference in PIL.

    pad      paste on a square of the mean colour -> resize to img_size           (LLaVA's pad)
    square   resize the short side to img_size    -> crop the centre    (CLIP's own processing)

The resize is bicubic with antialiasing on uint8, as in PIL, which the released code uses. Pixels
stay uint8, a quarter of the bytes of float32; the vision tower normalises them on the device.
"""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from megatron_croc.config.model import VisionTowerConfig
from megatron_croc.data.sample.image_header import ImageError, check_shape, read_header
from megatron_croc.errors import first_line


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Padding, resize and crop of an image; all pairs are (x, y) in pixels."""

    canvas: tuple[int, int]
    """Size of the canvas the image is pasted on; size of the image without padding."""

    paste: tuple[int, int]
    """Upper left corner of the image on the canvas."""

    resized: tuple[int, int]
    """Size the canvas is resized to."""

    crop: tuple[int, int]
    """Upper left corner of the img_size square that is cropped."""


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB; of 16-bit levels the high byte counts.

    PIL's own conversion clips 16-bit grey at 255, which makes nearly every pixel white.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        high = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Size, geometry and padding colour; the same for every decoder."""

    img_size: int
    """Height and width of the result, pixels."""

    aspect_ratio: Literal["pad", "square"]
    """pad: keep the whole image. square: crop the centre square."""

    fill: tuple[int, int, int]
    """Colour around a padded image, RGB 0..255."""

    @classmethod
    def build(
        cls, vision: VisionTowerConfig, aspect_ratio: Literal["pad", "square"]
    ) -> "ImageTransform":
        """Build the transform of a vision tower; the fill is its mean colour, rounded down."""
        red, green, blue = (int(mean * 255) for mean in vision.image_mean)
        return cls(img_size=vision.img_size, aspect_ratio=aspect_ratio, fill=(red, green, blue))

    def geometry(self, width: int, height: int) -> Geometry:
        """Compute padding, resize and crop of an image of this size.

        Raises:
            ImageError: canvas or resized image of a long and thin image exceed MAX_IMAGE_PIXELS.
        """
        size, long, short = self.img_size, max(width, height), min(width, height)
        check_shape(width, height, self.aspect_ratio, size)
        if self.aspect_ratio == "pad":
            return Geometry(
                canvas=(long, long),
                paste=((long - width) // 2, (long - height) // 2),
                resized=(size, size),
                crop=(0, 0),
            )
        resized_long = int(size * long / short)  # rounds down, as in transformers
        resized = (resized_long, size) if width >= height else (size, resized_long)
        return Geometry(
            canvas=(width, height),
            paste=(0, 0),
            resized=resized,
            crop=((resized[0] - size) // 2, (resized[1] - size) // 2),
        )

    def decode_with_pil(self, encoded: bytes) -> Tensor:
        """Decode and transform one image in PIL; the reference of every other implementation.

        Returns:
            uint8 [3, img_size, img_size].

        Raises:
            ImageError: the image is unreadable, truncated or too large.
        """
        header = read_header(encoded)
        geometry = self.geometry(header.width, header.height)
        try:
            image = as_rgb(Image.open(io.BytesIO(encoded)))
        except Exception as error:  # as in read_header
            raise ImageError(f"image does not decode: {first_line(error)}") from error
        if geometry.canvas != image.size:
            canvas = Image.new("RGB", geometry.canvas, self.fill)
            canvas.paste(image, geometry.paste)
            image = canvas
        image = image.resize(geometry.resized, Image.Resampling.BICUBIC)
        left, top = geometry.crop
        image = image.crop((left, top, left + self.img_size, top + self.img_size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def transform(self, pixels: Tensor) -> Tensor:
        """Transform one decoded image in torch: faster, and at most 2 levels from PIL.

        Args:
            pixels: uint8 [height, width, 3].

        Returns:
            uint8 [3, img_size, img_size].
        """
        height, width, _ = pixels.shape
        geometry = self.geometry(width, height)
        (left, top), (wide, tall) = geometry.paste, geometry.resized
        if geometry.canvas[0] > width:
            pixels = self._pad(pixels, left=left, width=geometry.canvas[0])
        if geometry.canvas[1] > height:
            # Both resizes work along rows first, which does not change rows of one colour: the
            # rows above and below can be left out.
            rows = resize(pixels, (wide, height))
            pixels = self._pad(rows, top=top, height=geometry.canvas[1])
        resized = resize(pixels, (wide, tall))
        left, top = geometry.crop
        cut = resized[top : top + self.img_size, left : left + self.img_size]
        return cut.permute(2, 0, 1).contiguous()

    def _pad(
        self,
        pixels: Tensor,
        *,
        left: int = 0,
        top: int = 0,
        width: int | None = None,
        height: int | None = None,
    ) -> Tensor:
        """Paste pixels [h, w, 3] on a canvas of the fill colour, `width` x `height` if given."""
        h, w, _ = pixels.shape
        width, height = width or w, height or h
        canvas = pixels.new_empty((height, width, 3))
        row = torch.tensor(self.fill, dtype=torch.uint8).repeat(width, 1).to(pixels.device)
        canvas[:top], canvas[top + h :] = row, row  # whole rows: contiguous copies
        canvas[top : top + h, :left], canvas[top : top + h, left + w :] = (
            row[:left],
            row[left + w :],
        )
        canvas[top : top + h, left : left + w] = pixels
        return canvas


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by bicubic interpolation with antialiasing.

    Args:
        pixels: uint8 [height, width, 3]; float results are rounded.
        size: (width, height) of the result.

    Returns:
        uint8 [height, width, 3].
    """
    planes = pixels.permute(2, 0, 1)[None]
    if pixels.is_cuda:  # torch has no integer kernel on CUDA
        planes = planes.float()
    planes = F.interpolate(
        planes, size=size[::-1], mode="bicubic", antialias=True, align_corners=False
    )
    if planes.is_floating_point():
        planes = planes.round_().clamp_(0, 255).to(torch.uint8)
    return planes[0].permute(1, 2, 0)
