"""Find the samples of a WebDataset tar in one sequential pass, without unpacking it.

    tar --8 MB pieces--> headers, sha256 --group by key--> samples: text, images (offset, length)

A member's key is its name up to the first dot of the last path part, as in WebDataset. Consecutive
members with one key are one sample. Names are labels only: no file is written under them. A member
that is not a plain file (link, device), or whose name leaves its folder, makes its sample unusable.
A damaged header is a fault here; Python's tarfile takes it for the end of the archive.
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
"""Bytes of one read."""

BLOCK = 512
MAX_NAME_BYTES = 1 << 20
"""Largest extended header that is read; a damaged length must not fill the memory."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
"""Last suffixes that mark an image; its format is read from its bytes."""

Place = tuple[int, int]
"""(offset, length) of a member's bytes."""


@dataclass(kw_only=True)
class TarSample:
    """One sample of a tar."""

    key: str
    json: Place | None = None
    txt: Place | None = None
    images: list[tuple[str, Place]] = field(default_factory=list)
    """(suffix, place) of each image."""

    fault: tuple[BadKind, str] | None = None
    """First fault found, as (kind, reason); None: usable."""


@dataclass(kw_only=True)
class TarScan:
    """Content of a tar."""

    samples: list[TarSample]
    num_bytes: int
    sha256: str
    damage: str | None
    """Fault of the archive; samples before it are usable. None: no fault."""

    @property
    def text_format(self) -> TextFormat:
        """Format of the texts: json if any sample has one; .txt members are then ignored."""
        return "txt" if all(sample.json is None for sample in self.samples) else "json"


class _Damage(Exception):
    """Error at the first header that is not valid."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    name: str
    offset: int
    size: int
    is_file: bool


def scan_tar(storage: Storage) -> TarScan:
    """Read a tar from end to end.

    Raises:
        OSError: every attempt to read failed.
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
        # The last sample may lack the members after the damage.
        if samples and samples[-1].fault is None:
            samples[-1].fault = ("damaged_tar", f"the archive breaks off: {damage}")
    for sample in samples:
        sample.images.sort(key=lambda image: _natural(image[0]))
    return TarScan(samples=samples, num_bytes=stream.size, sha256=stream.finish(), damage=damage)


def place_of_text(sample: TarSample, text_format: TextFormat) -> Place | None:
    """Return the place of a sample's text in this format; None if it has none."""
    return sample.json if text_format == "json" else sample.txt


def _add(samples: list[TarSample], seen: set[str], member: _Member) -> None:
    path = PurePosixPath(member.name)
    stem, _, suffix = path.name.partition(".")
    if not suffix or not stem:
        return  # a folder, a README, a hidden file: not a member of a sample
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
    """Return a sort key by which 10.jpg comes after 2.jpg."""
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", suffix)
    ]


def _members(stream: "_Stream") -> Iterator[_Member]:
    """Yield the members in order; supports ustar, GNU long names and pax headers."""
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
    """Parse an octal number, or base 256 if the first bit is set; -1 if invalid."""
    if field_bytes[0] & 0x80:
        return int.from_bytes(field_bytes[1:], "big") if field_bytes[0] == 0x80 else -1
    digits = field_bytes.strip(b" \0")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return -1


def _parse_pax(text: bytes) -> dict[str, str]:
    """Parse records of the form "length key=value\\n"; others are ignored."""
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
    """Sequential reader of a storage that computes its digest."""

    def __init__(self, storage: Storage) -> None:
        self.size = retry(storage.size, storage.location)
        self.position = 0
        self._storage = storage
        self._digest = hashlib.sha256()
        self._piece, self._piece_begin = b"", 0

    def take(self, length: int) -> bytes:
        """Read the next bytes; fewer at the end."""
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
        """Skip bytes, at most to the end."""
        self.position = min(self.position + length, self.size)
        self._here()

    def finish(self) -> str:
        """Read the rest; return the sha256 of the whole."""
        self.position = self.size
        self._here()
        return self._digest.hexdigest()

    def _here(self) -> memoryview:
        """Return the bytes read from the position on; read more if there are none."""
        while self.position >= (end := self._piece_begin + len(self._piece)) and end < self.size:
            length = min(PIECE_BYTES, self.size - end)
            read = functools.partial(self._storage.read, end, length)
            self._piece = retry(read, self._storage.location)
            self._piece_begin = end
            self._digest.update(self._piece)
        return memoryview(self._piece)[self.position - self._piece_begin :]
