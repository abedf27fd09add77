"""Encoded images -> pixels, by DALI where it can, by PIL where it must.

    bytes -> header (format, size) -+- JPEG, PNG, .. -> DALI decode -> torch resize -+-> uint8
              too large: refused    +- other formats, what DALI fails on -> PIL -----+

DALI's decoder gives Pillow's exact pixels at a fraction of the time; its CPU resize is slow and
further from Pillow than torch's, so only the decoder is used. A batch DALI fails on is run again
one by one, so the pixels of an image never depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_croc.data.image_transform import ImageError, ImageHeader, ImageTransform, read_header
from megatron_croc.errors import DataError
from megatron_croc.log import get_logger

DALI_FORMATS = frozenset({"JPEG", "PNG", "WEBP", "BMP"})
"""Formats whose DALI decode was compared with Pillow's and found equal."""

DALI_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
"""8-bit pixel modes; 16-bit PNGs come out of DALI and Pillow with different levels."""

MAX_DALI_BATCH = 32
"""Images of one DALI call; bounds its memory, not the micro-batch."""

logger = get_logger(__name__)

DecoderName = Literal["dali", "pil"]
"""What images are decoded with."""

DaliDecode = Callable[[Sequence[bytes]], list[Tensor]]
"""Encoded images -> uint8 [height, width, 3] each; RuntimeError when one does not decode."""


def resolve_decoder(image_decoder: Literal["auto", "dali", "pil"]) -> DecoderName:
    """The decoder that will be used; call it once, as a fallback is logged here.

    Raises:
        DataError: `dali` is asked for and not installed.
    """
    if image_decoder == "pil":
        return "pil"
    try:
        import nvidia.dali  # noqa: F401 (lazy: DALI is optional)
    except (ImportError, OSError) as error:  # OSError: a CUDA library it was built for is missing
        if image_decoder == "dali":
            raise DataError(
                f"image_decoder is dali, but DALI does not import ({error}): install the "
                "nvidia-dali-cuda wheel for this CUDA version, or set image_decoder to auto"
            ) from error
        logger.warning("DALI does not import (%s); images are decoded by PIL", error)
        return "pil"
    return "dali"


class ImageDecoder:
    """Decodes and transforms images. One per thread: a DALI pipeline is not shared."""

    def __init__(self, transform: ImageTransform, decoder: DecoderName) -> None:
        """Args: transform: size and fit. decoder: as given by resolve_decoder."""
        self.transform = transform
        self._dali = _build_dali_decode() if decoder == "dali" else None

    def decode(self, encoded: Sequence[bytes]) -> list[Tensor | ImageError]:
        """Decode images independently of each other.

        Returns:
            For each image uint8 [3, img_size, img_size], or the reason it has none.
        """
        results: list[Tensor | ImageError] = []
        for_dali: list[int] = []
        for index, data in enumerate(encoded):
            try:
                header = read_header(data)
                self.transform.geometry(header.width, header.height)
                if self._dali is not None and _is_for_dali(header):
                    for_dali.append(index)
                    results.append(ImageError("not decoded yet"))
                else:
                    results.append(self.transform.decode_with_pil(data))
            except ImageError as error:
                results.append(error)
        for begin in range(0, len(for_dali), MAX_DALI_BATCH):
            indices = for_dali[begin : begin + MAX_DALI_BATCH]
            decoded = self._decode_with_dali([encoded[i] for i in indices])
            for index, result in zip(indices, decoded, strict=True):
                results[index] = result
        return results

    def _decode_with_dali(self, encoded: list[bytes]) -> list[Tensor | ImageError]:
        assert self._dali is not None
        try:
            return [self.transform.transform(pixels) for pixels in self._dali(encoded)]
        except RuntimeError:
            if len(encoded) > 1:
                return [self._decode_with_dali([data])[0] for data in encoded]
        try:
            return [self.transform.decode_with_pil(encoded[0])]
        except ImageError as error:
            return [error]


def _is_for_dali(header: ImageHeader) -> bool:
    return header.format in DALI_FORMATS and header.mode in DALI_MODES


def _build_dali_decode() -> DaliDecode:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def
    def decode_pipeline():
        encoded = fn.external_source(name="encoded", device="cpu")
        # LLaVA does not rotate by EXIF either.
        return fn.decoders.image(
            encoded, device="cpu", output_type=types.DALIImageType.RGB, adjust_orientation=False
        )

    # exec_dynamic: after a corrupt image the pipeline stays usable, and outputs are not
    # overwritten by the next run.
    pipeline: Any = decode_pipeline(
        batch_size=MAX_DALI_BATCH,
        num_threads=1,
        device_id=None,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    pipeline.build()

    def decode(encoded: Sequence[bytes]) -> list[Tensor]:
        pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        (decoded,) = pipeline.run()
        return [torch.from_numpy(np.array(decoded[i])) for i in range(len(encoded))]

    return decode
