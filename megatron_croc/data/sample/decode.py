"""Encoded images -> pixels, by DALI where it can, by PIL where it must.

    bytes -> header (format, size) -+- JPEG, PNG, .. -> DALI decode -> torch resize -+-> uint8
              too large: refused    +- other formats, what DALI fails on -> PIL -----+

DALI's decoder gives Pillow's exact pixels at a fraction of the time; its CPU resize is slow and
further from Pillow than torch's, so only the decoder is used. A batch DALI fails on is run again
one by one, so the pixels of an image never depend on its neighbours.

`dali_gpu` decodes JPEGs on the GPU (nvJPEG, or the hardware decoder where there is one), resizes
there, and leaves the pixels there. It is written after DALI's documentation and has not been run.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_croc.data.sample.image_transform import (
    ImageError,
    ImageHeader,
    ImageTransform,
    read_header,
)
from megatron_croc.errors import DataError
from megatron_croc.log import get_logger
from megatron_croc.parallel.device import has_cuda

DALI_FORMATS = frozenset({"JPEG", "PNG", "WEBP", "BMP"})
"""Formats whose DALI decode was compared with Pillow's and found equal."""

DALI_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
"""8-bit pixel modes; 16-bit PNGs come out of DALI and Pillow with different levels."""

MAX_DALI_BATCH = 32
"""Images of one DALI call; bounds its memory, not the micro-batch."""

logger = get_logger(__name__)

DecoderName = Literal["dali", "dali_gpu", "pil"]
"""What images are decoded with."""

DaliDecode = Callable[[Sequence[bytes]], list[Tensor]]
"""Encoded images -> uint8 [height, width, 3] each; RuntimeError when one does not decode."""


def resolve_decoder(image_decoder: Literal["auto", "dali", "dali_gpu", "pil"]) -> DecoderName:
    """The decoder that will be used; call it once, as a fallback is logged here.

    Raises:
        DataError: `dali` or `dali_gpu` is asked for and not installed, or there is no GPU.
    """
    if image_decoder == "pil":
        return "pil"
    if image_decoder == "dali_gpu" and not has_cuda():
        raise DataError(
            "image_decoder is dali_gpu, but there is no CUDA device: set image_decoder to auto"
        )
    try:
        import nvidia.dali  # noqa: F401 (lazy: DALI is optional)
    except (ImportError, OSError) as error:  # OSError: a CUDA library it was built for is missing
        if image_decoder != "auto":
            raise DataError(
                f"image_decoder is {image_decoder}, but DALI does not import ({error}): install "
                "the nvidia-dali-cuda wheel for this CUDA version, or set image_decoder to auto"
            ) from error
        logger.warning("DALI does not import (%s); images are decoded by PIL", error)
        return "pil"
    return "dali" if image_decoder == "auto" else image_decoder


class ImageDecoder:
    """Decodes and transforms images. One per thread: a DALI pipeline is not shared."""

    def __init__(
        self,
        transform: ImageTransform,
        decoder: DecoderName,
        device: torch.device | None = None,
    ) -> None:
        """Build the pipeline.

        Args:
            transform: size and fit.
            decoder: as given by resolve_decoder.
            device: where dali_gpu works and leaves the pixels; a thread has no device of its own.
        """
        self.transform = transform
        self._device = device if decoder == "dali_gpu" else torch.device("cpu")
        assert self._device is not None, "dali_gpu needs its device"
        self._dali = None if decoder == "pil" else _build_dali_decode(self._device)

    def decode(self, encoded: Sequence[bytes]) -> list[Tensor | ImageError]:
        """Decode images independently of each other.

        Returns:
            For each image uint8 [3, img_size, img_size] on the decoder's device, or the reason it
            has none.
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
            return [self.transform.decode_with_pil(encoded[0]).to(self._device)]
        except ImageError as error:
            return [error]


def _is_for_dali(header: ImageHeader) -> bool:
    return header.format in DALI_FORMATS and header.mode in DALI_MODES


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
            jpeg_fancy_upsampling=True,  # on the GPU: chroma as libjpeg, and so Pillow, has it
        )

    # exec_dynamic: after a corrupt image the pipeline stays usable, and outputs are not
    # overwritten by the next run, so torch may keep them without a copy.
    pipeline: Any = decode_pipeline(
        batch_size=MAX_DALI_BATCH,
        num_threads=1,
        device_id=(device.index or 0) if on_gpu else None,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    pipeline.build()

    def decode(encoded: Sequence[bytes]) -> list[Tensor]:
        # no_copy: the arrays live until run() has returned.
        arrays = [np.frombuffer(data, np.uint8) for data in encoded]
        pipeline.feed_input("encoded", arrays)
        # On torch's stream: what reads the pixels is queued behind the decoder, and DALI uses their
        # memory again behind what has read them. Without it both would rest on the host alone.
        stream = torch.cuda.current_stream(device) if on_gpu else None
        (decoded,) = pipeline.run(stream)
        return [torch.from_dlpack(decoded[i]) for i in range(len(encoded))]

    return decode
