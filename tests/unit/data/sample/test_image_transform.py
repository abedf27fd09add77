"""Pixels equal the released processing; the fast path stays close to PIL; bombs are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from megatron_croc.config.model import VisionTowerConfig
from megatron_croc.data.sample.image_header import ImageError, read_header
from megatron_croc.data.sample.image_transform import ImageTransform, resize

MAX_LEVELS = 2  # torch's resize against PIL's: both round, at different places


def encode(pixels, image_format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(width, height, seed=0):
    """Smooth colours with some detail, as in a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-8, 9, (height, width, 3))
    return np.clip(np.asarray(smooth).astype(int) + noise, 0, 255).astype(np.uint8)


def header_only_png(width, height):
    """A PNG whose header claims a size and that has no pixels."""

    def chunk(name, body):
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(("aspect_ratio", "name"), [("pad", "v1_pad"), ("square", "plain_square")])
def test_released_pixels(golden_dir, aspect_ratio, name):
    golden = load_file(golden_dir / "tokens" / "images.safetensors")
    vision = VisionTowerConfig(img_size=56)
    transform = ImageTransform.build(vision, aspect_ratio)
    mean, std = np.array(vision.image_mean), np.array(vision.image_std)
    for index, raw in enumerate((golden["raw_wide"], golden["raw_tall"])):
        expected = golden[f"pixel_values_{name}"][index].transpose(1, 2, 0) * std + mean
        expected = np.rint(expected * 255).transpose(2, 0, 1)
        oracle = transform.decode_with_pil(encode(raw)).numpy()
        np.testing.assert_array_equal(oracle, expected)
        fast = transform.transform(torch.from_numpy(raw)).numpy()
        assert np.abs(fast.astype(int) - expected).max() <= MAX_LEVELS


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize(
    "size", [(640, 480), (333, 500), (57, 56), (56, 56), (20, 31), (1, 7), (900, 30)]
)
def test_torch_path_is_close_to_pil(aspect_ratio, size):
    transform = ImageTransform(img_size=56, aspect_ratio=aspect_ratio, fill=(122, 116, 104))
    pixels = photo(*size)
    oracle = transform.decode_with_pil(encode(pixels))
    fast = transform.transform(torch.from_numpy(pixels))
    assert fast.shape == oracle.shape == (3, 56, 56)
    assert (fast.int() - oracle.int()).abs().max() <= MAX_LEVELS


@pytest.mark.parametrize("size", [(90, 60), (61, 97), (20, 20)])
def test_the_floating_resize_of_a_gpu_is_close_to_pil(size):
    pixels = photo(*size)
    found = resize(torch.from_numpy(pixels).float(), (56, 48))  # a GPU has no integer kernel
    oracle = np.array(Image.fromarray(pixels).resize((56, 48), Image.Resampling.BICUBIC))
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - oracle).max() <= MAX_LEVELS


def test_pad_keeps_everything_and_square_cuts_the_sides():
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, :20] = 255
    build = {"img_size": 40, "fill": (10, 20, 30)}
    padded = ImageTransform(aspect_ratio="pad", **build).decode_with_pil(encode(pixels))
    assert padded[:, 0, 0].tolist() == [10, 20, 30]
    assert (padded[:, 20, 2] == 255).all()
    cropped = ImageTransform(aspect_ratio="square", **build).decode_with_pil(encode(pixels))
    assert (cropped == 0).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"not an image", "12 bytes of no known format"),
        (b"", "0 bytes of no known format"),
        (header_only_png(65500, 65500), "too large"),
        (header_only_png(10_000, 9_000), "at most"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_headers(data, reason):
    with pytest.raises(ImageError, match=reason):
        read_header(data)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_thin_images_cannot_blow_up(aspect_ratio):
    transform = ImageTransform(img_size=336, aspect_ratio=aspect_ratio, fill=(0, 0, 0))
    with pytest.raises(ImageError, match="too long and thin"):
        transform.geometry(1, 1_000_000)


def test_truncated_image_is_refused():
    transform = ImageTransform(img_size=56, aspect_ratio="pad", fill=(0, 0, 0))
    data = encode(photo(200, 100), "JPEG")
    with pytest.raises(ImageError, match="does not decode"):
        transform.decode_with_pil(data[: len(data) // 2])
