"""Tars are read and indexed alike: which members make a sample, and which are told."""

import io
import itertools
import re
import tarfile
from pathlib import PurePosixPath

import pytest

from megatron_croc.data.prepare.tar_scan import _parts_of, scan_tar
from megatron_croc.data.prepare.tar_stream import _number
from megatron_croc.data.records.fields import FieldRules
from megatron_croc.data.store.storage import open_storage
from tests.unit.data.prepare.test_inputs import (
    PICTURES,
    captions,
    index,
    make,
    samples,
    write_tar,
)
from tests.unit.data.small_samples import jpeg

TARS = {
    # name: (members, captions read, kind of the fault or None)
    "json of metadata": (
        [("0.jpg", 1), ("0.json", b'{"width": 3}'), ("0.txt", b"\xef\xbb\xbfa"),
         ("1.jpg", 2), ("1.json", b'{"caption": "b", "sha256": "0"}'), ("1.txt", b"b"),
         ("2.jpg", 2), ("2.txt", b"{c")],
        ["a", "b", "{c"], None,
    ),
    "a folder, a hidden file, a README": (
        [("v1.0/", None), ("v1.0/0.txt", b"a"), ("._0.jpg", b"Mac"), ("README.md", b"x"),
         ("LICENSE.txt", b"MIT")],
        ["a"], None,
    ),
    "dots": (
        [("shot.v1.0.jpg", 1), ("shot.v1.0.txt", b"a"), ("shot.v1.1.jpg", 1),
         ("shot.v1.1.txt", b"b"), ("good.txt", b"c")],
        ["c"], {"dotted_key": 2},
    ),
    "one dotted text": (
        [("0.jpg", 1), ("0.caption.txt", b"a"), ("0.meta.json", b"{}")], ["a"], None,
    ),
    "two dotted texts": (
        [("0.jpg", 1), ("0.blip.txt", b"a"), ("0.alt.txt", b"b"), ("1.txt", b"c")],
        ["c"], {"missing_caption": 1},
    ),
    "image under no suffix": ([("0.txt", b"a"), ("1", 1)], ["a"], {"record": 1}),
    "image under an unknown suffix": ([("0.txt", b"a"), ("0.img", 1)], ["a"], None),
    "every suffix": (
        [(f"0.{n}.{s}", 1) for n, s in enumerate(("JPG", "jpe", "jfif", "jp2", "avif", "tga"))]
        + [("0.txt", b"a")],
        ["a"], None,
    ),
    "image not in the tar": (
        [("0.json", b'{"caption": "a", "url": "http://x/0.jpg"}'), ("1.txt", b"b")],
        ["b"], {"missing_image": 1},
    ),
    "array for an image": ([("0.txt", b"a"), ("0.npy", b"x"), ("1.txt", b"b")], ["b"],
                           {"missing_image": 1}),
    "text under another suffix": ([("0.caption", b"a"), ("0.jpg", 1), ("1.txt", b"b")], ["b"],
                                  {"missing_caption": 1}),
    "junk behind the end": ([("0.txt", b"a")], ["a"], {"damaged_tar": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_tars_are_read_and_indexed_alike(tmp_path, name):
    members, expected, kinds = TARS[name]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member.rstrip("/"))
            if data is None:
                info.type = tarfile.DIRTYPE
            data = PICTURES[f"{data}.jpg"] if isinstance(data, int) else data or b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if name == "junk behind the end":
        with open(tmp_path / "a.tar", "ab") as file:
            file.write(b"x" * 700)
    reports = (
        make(tmp_path / "a.tar", tmp_path / "made"),
        index([tmp_path / "a.tar"], tmp_path / "i"),
    )
    for report, folder in zip(reports, ("made", "i"), strict=True):
        assert captions(tmp_path / folder) == expected
        assert report.num_skipped == (kinds or {})
        num_images = sum(isinstance(d, int) for m, d in members if m.split(".")[0] == "0")
        if kinds is None:
            assert len(samples(tmp_path / folder)[0][1]) == num_images
    assert samples(tmp_path / "made") == samples(tmp_path / "i")


def test_rules_reach_members(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", PICTURES["0.jpg"]), ("0.mask.png", jpeg(1)),
                                         ("0.json", b'{"headline": "x"}')])  # fmt: skip
    rules = FieldRules.parse(["headline=caption"], ["mask.png"])
    report = make(tar, tmp_path / "out", rules=rules)
    assert (report.num_images, captions(tmp_path / "out")) == (1, ["x"])


def test_parts_of_names_are_those_of_pathlib():
    folders = ("", "/", "//", "./", "a/", "a//", "../", "a/../", "a/./", "x.y/")
    for name in itertools.product(folders, ("b.jpg", ".b.jpg", "..", "b", "b..jpg", "a b.0.jpg")):
        path = PurePosixPath("".join(name))
        folder, last = _parts_of("".join(name))
        assert (last, f"{folder}key") == (path.name, str(path.with_name("key"))), name
        assert (folder[:1] == "/") == path.is_absolute(), name
        assert (".." in folder.split("/")) == (".." in path.parts[:-1]), name


@pytest.mark.parametrize(
    "digits", [b"0_1", b"+1", b"-1", b" 1 1", b"8", b"\xb2", b"1\0 ", b"  17", b"", b"0o7"]
)
def test_numbers_of_headers_are_octal_digits(digits):
    plain = re.fullmatch(rb"[ \0]*([0-7]*)[ \0]*", digits)
    assert _number(digits.ljust(12, b"\0")) == (int(plain[1] or b"0", 8) if plain else -1)


@pytest.mark.parametrize("size", ["\u0662", "-1", "1_0", "9" * 30, "many"])
def test_a_size_of_a_pax_header_is_of_ascii_digits(tmp_path, size):
    """Other digits, which Python's int takes too, would place the next member elsewhere."""
    record = f"size={size}\n".encode()
    text = str(len(record) + 3).encode() + b" " + record
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(text)
    member = tarfile.TarInfo("a.txt")
    member.size = 2
    path = tmp_path / "a.tar"
    path.write_bytes(
        info.tobuf(tarfile.USTAR_FORMAT)
        + text.ljust(512, b"\0")
        + member.tobuf(tarfile.USTAR_FORMAT)
        + b"hi".ljust(512, b"\0")
        + bytes(1024)
    )
    assert "is cut off" in str(scan_tar(open_storage(path)).damage)
