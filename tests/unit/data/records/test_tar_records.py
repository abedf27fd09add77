"""Records of a tar: the order of its images, its texts, and members that are not read."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.records.fields import IMAGE_SUFFIXES, is_image_bytes
from megatron_croc.data.records.reading import (
    join_texts,
    parse_text,
    read_record,
)
from tests.unit.data.small_samples import jpeg

PICTURE = jpeg(1)


def test_order_of_a_tars_images():
    def order(members, **record):
        reading = read_record({"caption": "x", **record}, "x", members=members)
        return reading.images, [note for note in reading.notes if note.startswith("images")]

    left_right = ["k.left.png", "k.right.png"]
    tar, record = ["images in the order of the tar"], ["images in the order of the record"]
    numbers = ["images in the order of the numbers in their names"]
    assert order(["k.question.png", "k.answer.png"]) == ([0, 1], tar)
    assert order(["k.10.jpg", "k.9.jpg"]) == ([1, 0], numbers)
    assert order(["k.page10.jpg", "k.page9.jpg"]) == ([1, 0], numbers)
    assert order(["k.b.jpg", "k.2.jpg", "k.1.jpg"]) == ([0, 1, 2], tar)
    for names in (
        ["k.right.png", "k.left.png"],
        ["right.png", "left.png"],
        ["right", "left"],
        ["images/k.right.png", "images/k.left.png"],
        ["k.right", "k.left"],
    ):
        assert order(left_right, images=names) == ([1, 0], record), names
    assert order(left_right, images=["coco/7.jpg", "coco/8.jpg"]) == ([0, 1], tar)
    assert order(["k.jpg"], image="coco/7.jpg") == ([0], [])
    for names in (["k.left.png"], ["left", "other"], ["a", "b", "c"]):
        with pytest.raises(BadSampleError, match=r"tar holds"):
            order(left_right, images=names)
    with pytest.raises(BadSampleError, match="both in the record"):
        order(["k.jpg"], image=PICTURE)


def test_other_members_of_a_tar():
    def read(other, members=()):
        return read_record({"caption": "x"}, "x", members=members, other_members=[other])

    for other in ("k.image.npy", "k.pixel_values.pth", "k.mp4"):
        with pytest.raises(BadSampleError, match="not read"):
            read(other, ["k.jpg"])
    with pytest.raises(BadSampleError, match="may hold an image"):
        read("k.npy")
    assert read("k.npy", ["k.jpg"]).notes == {"member .npy is not read": "k.npy"}
    assert read("k.cls").notes == {}


def test_texts_of_a_tar():
    meta, talk = b'{"width": 3}', b'{"caption": "a"}'
    assert join_texts(meta, b"\xef\xbb\xbfa cat") == ({"width": 3, "caption": "a cat"}, True)
    assert join_texts(talk, b" a ") == ({"caption": "a"}, False)
    assert join_texts(talk, b"b") == ({"caption": "a", "txt": "b"}, False)
    assert join_texts(b'{"alt": "z"}', b"b")[1] is True
    assert parse_text(b"\xef\xbb\xbf{}", "json") == {}
    assert parse_text(b"{a", "mixed") == {"caption": "{a"}
    assert parse_text(b'{"a": 1}', "mixed") == {"a": 1}


def test_every_suffix_and_head_of_an_image():
    Image.init()
    others = "bufr grib h5 hdf pdf ps eps emf wmf mpg mpeg fit fits gbr iim palm pcd"
    decoded = {suffix.removeprefix(".") for suffix in Image.registered_extensions()}
    decoded -= set(re.findall(r"\w+", others))
    assert decoded <= IMAGE_SUFFIXES
    grey = Image.fromarray(np.zeros((4, 4), np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000"):
        buffer = io.BytesIO()
        grey.save(buffer, kind)
        assert is_image_bytes(buffer.getvalue()[:32]), kind
    assert not is_image_bytes(b"BMW is a car maker from Munich")
