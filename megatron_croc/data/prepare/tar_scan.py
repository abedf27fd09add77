"""The samples of a WebDataset tar, found in one sequential pass without unpacking anything.

    tar --8 MB pieces--> headers, sha256 --group by key--> samples: text, images (offset, length)

A member's key is its name up to the first dot of the last path part, as in WebDataset; neighbours
of one key are one sample. Names are labels here: nothing is ever written under them. What is not a
plain file (links, devices) or has a name that leaves its folder spoils the sample it belongs to.
Python's tarfile takes a damaged header for the end of the archive; here it is a fault.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from megatron_croc.data.bad_samples import BadKind
from megatron_croc.data.store.shard_writer import TextFormat
from megatron_croc.data.store.storage import Storage, retry

PIECE_BYTES = 8 << 20
"""Read at once."""

BLOCK = 512
MAX_NAME_BYTES = 1 << 20
"""Longest extended header taken; a damaged length must not fill the memory."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
"""A member is an image by its last suffix; its format is read from its bytes."""

Place = tuple[int, int]
"""(offset, length) of a member's bytes."""


@dataclass(kw_only=True)
class TarSample:
    """One sample of a tar."""

    key: str
    json: Place | None = None
    txt: Place | None = None
    images: list[tuple[str, Place]] = field(default_factory=list)
    """(suffix, place)."""

    fault: tuple[BadKind, str] | None = None
    """Why it cannot be used; the first reason found."""


@dataclass(kw_only=True)
class TarScan:
    """What a tar holds."""

    samples: list[TarSample]
    num_bytes: int
    sha256: str
    damage: str | None
    """What is wrong with the archive; the samples before it are sound."""

    @property
    def text_format(self) -> TextFormat:
        """json where any sample has one: a .txt beside it is then ignored."""
        return "txt" if all(sample.json is None for sample in self.samples) else "json"


class _Damage(Exception):
    """The archive is no tar from here on."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    name: str
    offset: int
    size: int
    is_file: bool


def scan_tar(storage: Storage) -> TarScan:
    """Read a tar from end to end.

    Raises:
        OSError: the storage failed again and again.
    """
    stream = _Stream(storage)
    samples: list[TarSample] = []
    seen: set[str] = set()
    damage = None
    try:
        for member in _members(stream):
            _add(samples, seen, member)
    except _Damage as error:
        damage = str(error)
        # The last sample may lack the members behind the damage.
        if samples and samples[-1].fault is None:
            samples[-1].fault = ("damaged_tar", f"the archive breaks off: {damage}")
    for sample in samples:
        sample.images.sort(key=lambda image: _natural(image[0]))
    return TarScan(samples=samples, num_bytes=stream.size, sha256=stream.finish(), damage=damage)


def place_of_text(sample: TarSample, text_format: TextFormat) -> Place | None:
    """Where a sample's text stands, if it has one of that kind."""
    return sample.json if text_format == "json" else sample.txt


def _add(samples: list[TarSample], seen: set[str], member: _Member) -> None:
    path = PurePosixPath(member.name)
    stem, _, suffix = path.name.partition(".")
    if not suffix or not stem:
        return  # a folder, a README, a hidden file: nothing that could be a sample
    key = str(path.with_name(stem))
    if not samples or samples[-1].key != key:
        samples.append(TarSample(key=key))
        if key in seen:
            samples[-1].fault = ("duplicate_key", f"key {key!r:.80} came before in this tar")
        seen.add(key)
    sample, suffix = samples[-1], suffix.lower()
    if path.is_absolute() or ".." in path.parts:
        sample.fault = sample.fault or (
            "unsafe_member",
            f"name {member.name!r:.80} leaves its folder",
        )
    elif not member.is_file:
        sample.fault = sample.fault or ("unsafe_member", f"{member.name!r:.80} is not a plain file")
    place = (member.offset, member.size)
    taken = [name for name, _ in sample.images]
    taken += [name for name in ("json", "txt") if getattr(sample, name) is not None]
    if suffix in taken:
        sample.fault = sample.fault or ("duplicate_key", f"{member.name!r:.80} is there twice")
    elif suffix in ("json", "txt"):
        setattr(sample, suffix, place)
    elif suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
        sample.images.append((suffix, place))


def _natural(suffix: str) -> list[tuple[int, str]]:
    """10.jpg comes after 2.jpg."""
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", suffix)
    ]


def _members(stream: "_Stream") -> Iterator[_Member]:
    """Members in order; ustar, GNU long names and pax headers are understood."""
    long_name, pax = None, {}
    while True:
        begin = stream.position
        header = stream.take(BLOCK)
        if not header:
            raise _Damage(f"it ends at byte {begin} without an end mark")
        if len(header) < BLOCK:
            raise _Damage(f"it ends inside the header at byte {begin}")
        if not any(header):
            return
        if _number(header[148:156]) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
            raise _Damage(f"the header at byte {begin} is damaged")
        size, kind = _number(header[124:136]), header[156:157]
        if "size" in pax and pax["size"].isdigit():
            size = int(pax["size"])
        if size < 0 or stream.position + size > stream.size:
            raise _Damage(f"the member at byte {begin} is cut off")
        offset = stream.position
        if kind in (b"L", b"x", b"g", b"K"):
            if size > MAX_NAME_BYTES:
                raise _Damage(f"the header at byte {begin} claims a name of {size} bytes")
            text = stream.take(size)
            if kind == b"L":
                long_name = _text(text.rstrip(b"\0"))
            elif kind == b"x":
                pax = _parse_pax(text)
        else:
            stream.skip(size)
            name = _text(header[:100].partition(b"\0")[0])
            prefix = header[345:500].partition(b"\0")[0]
            if header[257:262] == b"ustar" and header[262:263] == b"\0" and prefix:
                name = f"{_text(prefix)}/{name}"
            yield _Member(
                name=pax.get("path") or long_name or name,
                offset=offset,
                size=size,
                is_file=kind in (b"0", b"\0", b"7"),
            )
            long_name, pax = None, {}
        stream.skip(-size % BLOCK)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def _number(field_bytes: bytes) -> int:
    """Octal, or base 256 where the first bit is set; -1 when neither."""
    if field_bytes[0] & 0x80:
        return int.from_bytes(field_bytes[1:], "big") if field_bytes[0] == 0x80 else -1
    digits = field_bytes.strip(b" \0")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return -1


def _parse_pax(text: bytes) -> dict[str, str]:
    """Records of the form "length key=value\\n"; what does not fit the form is left out."""
    found: dict[str, str] = {}
    while match := re.match(rb"(\d{1,9}) ", text):
        length = int(match[1])
        if length <= match.end():
            break
        key, _, value = text[match.end() : length].rstrip(b"\n").partition(b"=")
        found[_text(key)] = _text(value)
        text = text[length:]
    return found


class _Stream:
    """A storage read once from front to back, and its digest."""

    def __init__(self, storage: Storage) -> None:
        self.size = retry(storage.size, storage.location)
        self.position = 0
        self._storage = storage
        self._digest = hashlib.sha256()
        self._piece, self._piece_begin = b"", 0

    def take(self, length: int) -> bytes:
        """The next bytes; fewer at the end."""
        taken = []
        while length:
            here = self._here()
            if not here:
                break
            taken.append(bytes(here[:length]))
            self.position += len(taken[-1])
            length -= len(taken[-1])
        return b"".join(taken)

    def skip(self, length: int) -> None:
        """Go on without looking; the end is as far as it goes."""
        self.position = min(self.position + length, self.size)
        self._here()

    def finish(self) -> str:
        """Read what is left; sha256 of the whole."""
        self.position = self.size
        self._here()
        return self._digest.hexdigest()

    def _here(self) -> memoryview:
        """What has been read from the position on; reads further when that is nothing."""
        while self.position >= (end := self._piece_begin + len(self._piece)) and end < self.size:
            length = min(PIECE_BYTES, self.size - end)
            read = functools.partial(self._storage.read, end, length)
            self._piece = retry(read, self._storage.location)
            self._piece_begin = end
            self._digest.update(self._piece)
        return memoryview(self._piece)[self.position - self._piece_begin :]
