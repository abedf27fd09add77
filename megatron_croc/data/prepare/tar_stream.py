"""Members of a tar in one sequential pass, with its digest; nothing is unpacked.

    storage --8 MB pieces--> headers --> members (name, offset, size)
                        \\--> sha256

Supports ustar, GNU long names and pax headers. A damaged header is a fault here; Python's tarfile
takes it for the end of the archive. Tars laid end to end are one: reading goes on behind an end
mark.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_croc.data.store.storage import Storage, retry
from megatron_croc.file_reading import whole_number

PIECE_BYTES = 8 << 20
"""Bytes of one read."""

BLOCK = 512
MAX_NAME_BYTES = 1 << 20
"""Largest extended header that is read; a damaged length must not fill the memory."""

_FOLDER = b"5"
_VOLUME_LABEL = b"V"
_FILES = (b"0", b"\0", b"7")


class TarDamage(Exception):
    """Error at the first header that is not valid."""

    def __init__(self, reason: str, *, cuts_sample: bool = True) -> None:
        """Args: reason: the fault. cuts_sample: True if the last sample may lack members."""
        super().__init__(reason)
        self.cuts_sample = cuts_sample


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """One member that is no folder."""

    name: str
    offset: int
    size: int
    is_file: bool
    """False for links and devices."""


def tar_members(stream: "TarStream") -> Iterator[TarMember]:
    """Yield the members in order; the stream stands at the content of each.

    Raises:
        TarDamage: what follows cannot be read.
    """
    long_name, pax = None, {}
    while True:
        begin = stream.position
        header = stream.take(BLOCK)
        if not header:
            if stream.end_mark is not None:
                return
            raise TarDamage(f"it ends at byte {begin} without an end mark")
        if len(header) < BLOCK:
            raise TarDamage(
                f"it ends inside the header at byte {begin}", cuts_sample=stream.end_mark is None
            )
        if not any(header):
            stream.end_mark = begin
            continue
        if _number(header[148:156]) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
            if stream.end_mark is not None:
                raise TarDamage(
                    f"the bytes behind the end mark, from byte {begin} on, are no tar",
                    cuts_sample=False,
                )
            raise TarDamage(f"the header at byte {begin} is damaged")
        if stream.end_mark is not None:
            stream.num_joined, stream.end_mark = stream.num_joined + 1, None
        size, kind = _number(header[124:136]), header[156:157]
        if "size" in pax:
            size = -1 if (stated := whole_number(pax["size"])) is None else stated
        if size < 0 or stream.position + size > stream.size:
            raise TarDamage(f"the member at byte {begin} is cut off")
        offset = stream.position
        if kind in (b"L", b"x", b"g", b"K"):
            if size > MAX_NAME_BYTES:
                raise TarDamage(f"the header at byte {begin} claims a name of {size} bytes")
            text = stream.take(size)
            if kind == b"L":
                long_name = _text(text.rstrip(b"\0"))
            elif kind == b"x":
                pax = _parse_pax(text)
        else:
            name = _text(header[:100].partition(b"\0")[0])
            prefix = header[345:500].partition(b"\0")[0]
            if header[257:262] == b"ustar" and header[262:263] == b"\0" and prefix:
                name = f"{_text(prefix)}/{name}"
            name = pax.get("path") or long_name or name
            long_name, pax = None, {}
            if kind not in (_FOLDER, _VOLUME_LABEL) and not name.endswith("/"):
                yield TarMember(name=name, offset=offset, size=size, is_file=kind in _FILES)
            stream.skip(offset + size - stream.position)
        stream.skip(-size % BLOCK)


class TarStream:
    """Sequential reader of a storage that computes its digest."""

    def __init__(self, storage: Storage) -> None:
        """Args: storage: the tar."""
        self.size = retry(storage.size, storage.location)
        self.position = 0
        self.end_mark: int | None = None
        """Byte of the end mark that was read last; None: none since the last member."""
        self.num_joined = 0
        """Number of end marks behind which more members stand."""
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


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def _number(field_bytes: bytes) -> int:
    """Parse an octal number, or base 256 if the first bit is set; -1 if invalid."""
    if field_bytes[0] & 0x80:
        return int.from_bytes(field_bytes[1:], "big") if field_bytes[0] == 0x80 else -1
    digits = field_bytes.strip(b" \0") or b"0"
    try:
        return int(digits, 8) if digits.isdigit() else -1  # int() alone takes signs and _
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
