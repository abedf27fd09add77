"""Decode images with DALI where possible, else with PIL.

    bytes -> header (format, size) -+- JPEG, PNG, .. -> DALI decode -> torch resize -+-> uint8
              too large: refused    +- other formats, DALI failures -> PIL ---------+

DALI's decoder gives exactly the pixels of Pillow in less time. Its CPU resize is slow and differs
more from Pillow than torch's, so only the decoder is used. After a failure of DALI the images of
the batch are decoded one by one, so the pixels of an image never depend on other images.

`dali_gpu` decodes JPEGs on the GPU (nvJPEG or the hardware decoder), resizes them there and returns
pixels on the GPU. It follows DALI's documentation and has not been run.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_croc.data.sample.image_header import ImageError, ImageHeader, read_header
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.errors import DataError
from megatron_croc.log import get_logger
from megatron_croc.parallel.device import has_cuda

DALI_FORMATS = frozenset({"JPEG", "PNG", "WEBP", "BMP"})
"""Formats that DALI and Pillow were found to decode to equal pixels."""

DALI_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
"""8-bit pixel modes; DALI and Pillow decode 16-bit PNGs, also in RGB, to different levels."""

MAX_DALI_BATCH = 32
"""Largest number of images of one DALI call; bounds its memory, not the micro-batch."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

logger = get_logger(__name__)

DecoderName = Literal["dali", "dali_gpu", "pil"]
"""Library and device that decode images."""

DaliDecode = Callable[[Sequence[bytes]], list[Tensor]]
"""Encoded images -> uint8 [height, width, 3] each; RuntimeError if one does not decode."""


def resolve_decoder(image_decoder: Literal["auto", "dali", "dali_gpu", "pil"]) -> DecoderName:
    """Choose the decoder. Logs a fallback, so call it once.

    Raises:
        DataError: `dali` or `dali_gpu` is set but not installed, or there is no GPU.
    """
    if image_decoder == "pil":
        return "pil"
    if image_decoder == "dali_gpu" and not has_cuda():
        raise DataError(
            "image_decoder is dali_gpu, but there is no CUDA device: set image_decoder to auto"
        )
    try:
        import nvidia.dali  # noqa: F401 (lazy: DALI is optional)
    except (ImportError, OSError) as error:  # OSError: a CUDA library is missing
        if image_decoder != "auto":
            raise DataError(
                f"image_decoder is {image_decoder}, but DALI does not import ({error}): install "
                "the nvidia-dali-cuda wheel for this CUDA version, or set image_decoder to auto"
            ) from error
        logger.warning("DALI does not import (%s); images are decoded by PIL", error)
        return "pil"
    return "dali" if image_decoder == "auto" else image_decoder


class ImageDecoder:
    """Decodes and transforms images. One per thread: threads must not share a DALI pipeline."""

    def __init__(
        self,
        transform: ImageTransform,
        decoder: DecoderName,
        device: torch.device | None = None,
    ) -> None:
        """Build the pipeline.

        Args:
            transform: size and geometry.
            decoder: from resolve_decoder.
            device: of dali_gpu and its pixels; threads do not inherit the current device.
        """
        self.transform = transform
        self._device = device if decoder == "dali_gpu" else torch.device("cpu")
        assert self._device is not None, "dali_gpu needs its device"
        self._dali = None if decoder == "pil" else _build_dali_decode(self._device)

    def decode(self, encoded: Sequence[bytes]) -> list[Tensor | ImageError]:
        """Decode images, each independently of the others.

        Returns:
            For each image uint8 [3, img_size, img_size] on the decoder's device, or its error.
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
                    results.append(self.transform.decode_with_pil(data).to(self._device))
            except ImageError as error:
                results.append(error)
        for begin in range(0, len(for_dali), MAX_DALI_BATCH):
            indices = for_dali[begin : begin + MAX_DALI_BATCH]
            decoded = self._decode_with_dali([without_notes(encoded[i]) for i in indices])
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
            return [self.transform.decode_with_pil(encoded[0]).to(self._device)]
        except ImageError as error:
            return [error]


def _is_for_dali(header: ImageHeader) -> bool:
    return header.format in DALI_FORMATS and header.mode in DALI_MODES and header.bits <= 8


def without_notes(encoded: bytes) -> bytes:
    """Copy a PNG without its ancillary chunks (colour profiles, texts, dates); others unchanged.

    libpng prints a warning for each faulty one, such as "iCCP: known incorrect sRGB profile". Their
    names begin with a small letter (PNG specification, 5.4); they change no decoded RGB value.
    """
    if not encoded.startswith(_PNG_SIGNATURE):
        return encoded
    kept, begin = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while begin < len(encoded):
        end = begin + 12 + int.from_bytes(encoded[begin : begin + 4], "big")
        if encoded[begin + 4 : begin + 5].isupper():
            kept.append(encoded[begin:end])
        begin = end
    return b"".join(kept)


def _build_dali_decode(device: torch.device) -> DaliDecode:
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"

    @pipeline_def
    def decode_pipeline():
        encoded = fn.external_source(name="encoded", device="cpu", no_copy=True)
        return fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,  # LLaVA does not rotate by EXIF either
            jpeg_fancy_upsampling=True,  # on the GPU: upsample chroma as libjpeg (and Pillow) does
        )

    # exec_dynamic: the pipeline stays usable after a corrupt image, and outputs are not
    # overwritten by the next run, so torch can keep them without a copy.
    pipeline: Any = decode_pipeline(
        batch_size=MAX_DALI_BATCH,
        num_threads=1,
        device_id=(device.index or 0) if on_gpu else None,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    pipeline.build()

    def decode(encoded: Sequence[bytes]) -> list[Tensor]:
        # no_copy: the arrays are alive until run() returns.
        arrays = [np.frombuffer(data, np.uint8) for data in encoded]
        pipeline.feed_input("encoded", arrays)
        # On torch's stream: readers of the pixels are queued after the decoder, and DALI reuses
        # their memory after the readers. Otherwise only the host would order the two.
        stream = torch.cuda.current_stream(device) if on_gpu else None
        (decoded,) = pipeline.run(stream)
        return [torch.from_dlpack(decoded[i]) for i in range(len(encoded))]

    return decode
