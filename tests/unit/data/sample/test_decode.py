"""DALI and PIL give the same pixels, and one broken image harms no other."""

import builtins
import inspect
import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_croc.data.sample.decode import ImageDecoder, _build_dali_decode, resolve_decoder
from megatron_croc.data.sample.image_header import ImageError, read_header
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.errors import DataError

TRANSFORM = ImageTransform(img_size=56, aspect_ratio="pad", fill=(122, 116, 104))


def encoded(image_format, mode="RGB", size=(90, 60)):
    colours = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    buffer = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(buffer, image_format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def dali():
    pytest.importorskip("nvidia.dali")
    return ImageDecoder(TRANSFORM, "dali")


@pytest.mark.parametrize(
    ("image_format", "mode"),
    [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("WEBP", "RGB"),
        ("BMP", "RGB"),
        ("GIF", "P"),
    ],
)
def test_dali_equals_pil(dali, image_format, mode):
    data = encoded(image_format, mode)
    (pixels,) = dali.decode([data])
    assert isinstance(pixels, torch.Tensor)
    assert pixels.dtype == torch.uint8
    oracle = TRANSFORM.decode_with_pil(data)
    assert (pixels.int() - oracle.int()).abs().max() <= 2


def test_high_bytes_of_16_bit_rgb(dali):
    """Pillow takes the high byte, DALI rounds: such a PNG goes to Pillow."""

    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    levels = np.arange(0, 65536, 65536 // (56 * 56), dtype=np.uint16)[: 56 * 56].reshape(56, 56)
    rows = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", 56, 56, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    (pixels,) = dali.decode([data + chunk(b"IEND", b"")])
    assert isinstance(pixels, torch.Tensor)
    assert (pixels.numpy() == (levels >> 8)[None]).all()


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_broken_images_are_alone_in_failing(dali, decoder):
    images = dali if decoder == "dali" else ImageDecoder(TRANSFORM, "pil")
    good = [encoded("JPEG", size=(90 + i, 60)) for i in range(40)]
    alone = [images.decode([data])[0] for data in good]
    cut = good[1][:-200]  # a sound header: the decoder itself fails
    read_header(cut)
    mixed = [good[0], cut, *good[1:20], b"junk", *good[20:]]
    results = images.decode(mixed)
    broken = [i for i, result in enumerate(results) if isinstance(result, ImageError)]
    assert broken == [1, 21]
    kept = [result for result in results if isinstance(result, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(kept, alone, strict=True))


def test_pixels_on_a_gpu_are_ordered_on_torchs_stream(monkeypatch):
    """DALI keeps them until that stream is done with them; without it, until the host lets go."""

    class Pipeline:
        def build(self): ...

        def feed_input(self, name, arrays):
            self.count = len(arrays)

        def run(self, cuda_stream=None, /):
            assert cuda_stream == "the stream of cuda:1"
            return ([torch.full((2, 2, 3), 7, dtype=torch.uint8)] * self.count,)

    made = []

    def pipeline_def(_):
        return lambda **settings: made.append(settings) or Pipeline()

    dali = types.ModuleType("nvidia.dali")
    dali.fn, dali.types, dali.pipeline_def = object(), object(), pipeline_def
    monkeypatch.setitem(sys.modules, "nvidia.dali", dali)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: f"the stream of {where}")
    decode = _build_dali_decode(torch.device("cuda", 1))
    assert made[0]["exec_dynamic"] and made[0]["device_id"] == 1  # what a stream needs
    assert [pixels.shape for pixels in decode([b"1", b"2"])] == [(2, 2, 3)] * 2


def test_dali_takes_a_stream():
    dali = pytest.importorskip("nvidia.dali")
    assert list(inspect.signature(dali.Pipeline.run).parameters)[1] == "cuda_stream"


@pytest.mark.parametrize("mode", ["RGB", "P"])
@pytest.mark.parametrize(
    "note",
    [
        (b"iCCP", b"icc\0\0" + zlib.compress(b"junk" * 50)),
        (b"sRGB", b"\x09"),
        (b"sBIT", bytes(3)),
        (b"tRNS", bytes(300)),
        (b"gAMA", struct.pack(">I", 10_000)),
    ],
    ids=lambda note: note[0].decode(),
)
def test_libpng_prints_nothing_about_notes_in_a_png(dali, note, mode, capfd):
    plain = encoded("PNG", mode)
    kind, data = note
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    before_data = plain.index(b"IDAT") - 4
    (pixels,) = dali.decode([plain[:before_data] + chunk + plain[before_data:]])
    assert torch.equal(pixels, dali.decode([plain])[0])
    assert capfd.readouterr() == ("", "")


def test_no_images(dali):
    assert dali.decode([]) == []


def test_fallback_without_dali(monkeypatch):
    real_import = builtins.__import__

    def refuse_dali(name, *args, **kwargs):
        if name.startswith("nvidia.dali"):
            raise ImportError("no DALI here")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse_dali)
    assert resolve_decoder("auto") == "pil"
    assert resolve_decoder("pil") == "pil"
    with pytest.raises(DataError, match="image_decoder is dali, but DALI"):
        resolve_decoder("dali")
    with pytest.raises(DataError, match="image_decoder is dali_gpu, but there is no CUDA"):
        resolve_decoder("dali_gpu")
