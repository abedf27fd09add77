"""Digests find and name every kind of damage, for any division into shares."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_croc.checkpoint import manifest
from megatron_croc.checkpoint.manifest import (
    MANIFEST_FILE,
    FileDigest,
    digest_file,
    find_damage,
    is_finished,
    read_manifest,
    write_manifest,
)
from megatron_croc.errors import CheckpointError

CONTENT = {"a.distcp": bytes(range(256)) * 5, ".metadata": b"", "c.bin": b"x" * 300}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(manifest, "PIECE_BYTES", 100)
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path)
    return tmp_path


def test_digests_are_sha256_of_pieces(folder: Path):
    for name, content in CONTENT.items():
        pieces = [content[start : start + 100] for start in range(0, len(content), 100)]
        expected = [hashlib.sha256(piece).hexdigest() for piece in pieces]
        assert digest_file(folder / name) == FileDigest(num_bytes=len(content), sha256=expected)
    assert read_manifest(folder).keys() == CONTENT.keys()
    assert is_finished(folder) and find_damage(folder) == []


@pytest.mark.parametrize("shares", [1, 3, 50])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.distcp", 0),
        ("a.distcp", 99),
        ("a.distcp", 100),
        ("a.distcp", 1279),
        ("c.bin", 0),
        ("c.bin", 299),
    ],
)
def test_one_flipped_bit_is_found_by_exactly_one_share(
    folder: Path, shares: int, name: str, place: int
):
    content = bytearray(CONTENT[name])
    content[place] ^= 0x10
    (folder / name).write_bytes(content)
    found = [find_damage(folder, share=n, shares=shares) for n in range(shares)]
    start = place // 100 * 100
    end = min(start + 100, len(content))
    (line,) = [line for lines in found for line in lines]
    assert line == f"{name} is not what was written (in bytes {start}..{end})"


@pytest.mark.parametrize("shares", [1, 3, 50])
@pytest.mark.parametrize("name", CONTENT)
def test_a_lost_file_is_found_by_some_share(folder: Path, shares: int, name: str):
    (folder / name).unlink()
    found = [find_damage(folder, share=n, shares=shares) for n in range(shares)]
    assert {line for lines in found for line in lines} == {f"{name} is missing"}


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path):
    """Bytes per digest are part of the format: another size would call every file damaged."""
    row = {"bytes": 1, "sha256": [hashlib.sha256(b"1").hexdigest()]}
    rows = {".metadata": row, "__0_0.distcp": row}
    for name in rows:
        (tmp_path / name).write_bytes(b"1")
    recorded = {"piece_bytes": 67108864, "files": rows}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(recorded))
    assert find_damage(tmp_path) == []
    write_manifest(tmp_path)
    assert json.loads((tmp_path / MANIFEST_FILE).read_text()) == recorded


def test_lost_torn_and_grown_files_are_named(folder: Path):
    (folder / "a.distcp").unlink()
    (folder / ".metadata").write_bytes(b"!")
    (folder / "c.bin").write_bytes(b"x" * 299)
    assert find_damage(folder) == [
        ".metadata has 1 bytes, 0 were written",
        "a.distcp is missing",
        "c.bin has 299 bytes, 300 were written",
    ]


def test_digests_known_from_writing_are_not_read_again(folder: Path):
    known = {"a.distcp": FileDigest(num_bytes=1280, sha256=["0" * 64] * 13)}
    write_manifest(folder, known)
    assert read_manifest(folder)["a.distcp"] == known["a.distcp"]
    assert len(find_damage(folder)) == 13


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "manifest.json is missing: the checkpoint was never finished"),
        (b"", "manifest.json is damaged"),
        (b"[]", "manifest.json is damaged"),
        (b'{"piece_bytes": 5, "files": {}}', "piece_bytes is 5, not 100"),
        (
            json.dumps(
                {"piece_bytes": 100, "files": {"../x": {"bytes": 1, "sha256": ["0"]}}}
            ).encode(),
            "names '../x', which is not in its folder",
        ),
    ],
)
def test_a_folder_without_a_good_manifest_was_never_finished(folder: Path, content, words):
    (folder / MANIFEST_FILE).unlink()
    if content is not None:
        (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(folder)
    (line,) = find_damage(folder)
    assert words in line


@pytest.mark.parametrize(
    ("name", "told"), [("a.distcp", "no file of tensors"), (".metadata", "no index of tensors")]
)
def test_a_checkpoint_without_tensors_is_not_whole(folder: Path, name: str, told: str):
    """Its manifest was written when they were gone already."""
    (folder / name).unlink()
    write_manifest(folder)
    (line,) = find_damage(folder)
    assert told in line


def test_a_file_that_a_rank_has_written_must_be_there(folder: Path):
    digests = {"__1_0.distcp": FileDigest(num_bytes=1, sha256=["0"])}
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp was written, but is not there"):
        write_manifest(folder, digests)
