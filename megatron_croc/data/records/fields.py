"""Names of fields, columns and tar members: which are read, ignored or taken for an image.

    "image", "pixel_values", "left_file_name"   name an image: read, or the record is refused
    "id", "clip_score", "license"               are ignored on purpose (IGNORED)
    any other field that is not read            is told in the report

Names are compared in lower case and word by word: "imageFile" is (image, file).
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_croc.errors import ConfigError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IMAGE_SUFFIXES = _names(
    """
    jpg jpeg jpe jfif mpo png apng webp gif bmp dib tif tiff jp2 j2k j2c jpc jpf jpx ppm pgm
    pbm pnm pfm avif avifs tga icb vda vst ico cur icns dds qoi pcx dcx psd sgi rgb rgba bw
    ras xbm xpm blp fli flc ftc ftu im msp pxr heic heif svg
    """
)
"""Last suffixes that mark an image; its format is read from its bytes. heic and svg are no format
of Pillow or DALI: such an image is named as unreadable."""

MEDIA_SUFFIXES = _names(
    """
    mp4 avi mov mkv webm m4v mpg mpeg mp3 wav flac ogg m4a
    """
)
"""Last suffixes of videos and sounds, which are not read."""

ARRAY_SUFFIXES = _names(
    """
    npy npz pt pth pkl pickle pyd ten tensor safetensors h5 zarr
    """
)
"""Last suffixes of arrays, which may hold pixels and are not read."""

IMAGE_WORDS = _names(
    """
    image images img imgs picture pictures photo photos photograph pixel pixels jpg jpeg png
    webp gif bmp tiff thumbnail thumbnails screenshot screenshots
    """
)
"""Words of a name that speak of an image."""

MEDIA_WORDS = _names(
    """
    video videos audio audios
    """
)
"""Words of a name that speak of a video or a sound."""

FILE_WORDS = _names(
    """
    file files path paths filename filenames filepath filepaths frame frames
    """
)
"""Words of a name that speak of an image if the value ends like one."""

METADATA_WORDS = _names(
    """
    id ids idx index key uid uuid width height w h size sizes shape resolution aspect ratio
    channels hash sha md phash checksum url urls uri link links href score scores similarity
    license licence copyright credit author artist source sources origin dataset type types
    mode format count num number n has is exif meta metadata date time timestamp created
    class category categories label labels tag tags quality caption captions description
    text alt title status lang language bbox bboxes boxes
    """
)
"""Words by which a name that speaks of an image is about it, and does not hold it (image_id)."""

IGNORED = _names(
    """
    id ids idx uid uuid guid key keys hash sha md phash checksum width height size sizes
    resolution ratio url urls uri link links href source sources origin license licence
    copyright score scores similarity aesthetic punsafe pwatermark watermark nsfw exif meta
    metadata dataset status timestamp date created language lang split subset config type
    category categories index error message bbox bboxes
    """
)
"""Last words of names that are ignored on purpose: ids, sizes, hashes, scores, places, licences."""

IGNORED_NAMES = _names(
    """
    error_message clip_similarity_vitb32 clip_similarity_vitl14 clip_b32_similarity_score
    num_turns num_tokens num_images n_images model task __index_level_0__ __key__ __url__
    __local_path__ cls
    """
)
"""Whole names that are ignored on purpose."""

_NAMES_KEPT = 4096
"""Names whose words are kept: the fields of a dataset are few, and each stands in every record."""

_ADDRESS_WORDS = _names("url urls uri link links src href")
_SIZE_WORDS = _names("width height")

_MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
_IMAGE_OR_MEDIA_SUFFIXES = IMAGE_SUFFIXES | MEDIA_SUFFIXES
_SMALLEST_BMP = 26
_MAX_DEPTH = 6
"""Depth of a nested value to which images are looked for."""

_MAX_NAME = 512
"""Longest text that can be a file name."""


@dataclass(frozen=True, kw_only=True)
class FieldRules:
    """Fields that a user renames or ignores; the way out of every refusal that names a field."""

    rename: Mapping[str, str] = field(default_factory=dict)
    """Name in the input -> name in this schema."""

    ignore: frozenset[str] = frozenset()
    """Names that are as if absent, of fields and of tar members (their suffix)."""

    @classmethod
    def parse(cls, rename: Sequence[str] = (), ignore: Sequence[str] = ()) -> "FieldRules":
        """Parse OLD=NEW pairs and names. Raises ConfigError: a pair without `=`."""
        pairs = [pair.partition("=") for pair in rename]
        for (old, _, new), pair in zip(pairs, rename, strict=True):
            if not old or not new:
                raise ConfigError(f"--rename {pair}: write OLD=NEW, such as pic=image")
        return cls(rename={old: new for old, _, new in pairs}, ignore=frozenset(ignore))

    def apply(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a record that hold something, under their names in this schema."""
        rename, ignore = self.rename, self.ignore
        return {
            rename.get(name, name): value
            for name, value in record.items()
            if name not in ignore and not is_empty(value)
        }

    @property
    def as_json(self) -> dict[str, Any]:
        """Content for the identity of a job; empty without rules."""
        if not self.rename and not self.ignore:
            return {}
        return {"rename": dict(sorted(self.rename.items())), "ignore": sorted(self.ignore)}


@functools.lru_cache(_NAMES_KEPT)
def words_of(name: str) -> tuple[str, ...]:
    """Split a name into its words: "imageFile_2" -> image, file."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return tuple(re.findall(r"[a-z]+", spaced.lower()))


def suffix_of(name: str) -> str:
    """Return the last suffix of a file name or web address, in lower case and without the dot."""
    last = re.split(r"[?#]", name)[0] if "://" in name else name
    if "." not in last:
        return ""
    return last[max(last.rfind("/"), last.rfind("\\")) + 1 :].rpartition(".")[2].lower()


def is_empty(value: object) -> bool:
    """Return True for a value that holds nothing: null, NaN, "", and lists or structs of these."""
    if isinstance(value, str):
        return not value or value.isspace()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, bytes):
        return not value
    if isinstance(value, list | tuple):
        return all(entry is None or entry == [] for entry in value)
    if isinstance(value, dict):
        return all(entry is None for entry in value.values())
    return False


@functools.lru_cache(_NAMES_KEPT)
def is_file_name_field(name: str) -> bool:
    """Return True for `file_name`, `*_file_name` and their plurals, as in an image folder."""
    return bool(re.fullmatch(r"(.*_)?file_?names?", name.lower()))


@functools.lru_cache(_NAMES_KEPT)
def names_image(name: str) -> bool:
    """Return True if a field of this name holds images, and is not only about them."""
    if is_file_name_field(name):
        return True
    words = words_of(name)
    return not IMAGE_WORDS.isdisjoint(words) and METADATA_WORDS.isdisjoint(words)


def speaks_of_image(name: str, value: object) -> bool:
    """Return True if name or value of a field tells of an image or a video, read or not."""
    words = words_of(name)
    if not IMAGE_WORDS.isdisjoint(words) or not MEDIA_WORDS.isdisjoint(words):
        return True
    return is_file_name_field(name) or holds_image(value) or holds_image_name(value)


def is_about_caption(name: str, value: object) -> bool:
    """Return True for the web address or the size of what a caption belongs to."""
    words = words_of(name)
    if isinstance(value, str) and "://" in value:
        return not _ADDRESS_WORDS.isdisjoint(words)
    return not _SIZE_WORDS.isdisjoint(words)


def names_media(name: str, value: object) -> bool:
    """Return True if a field holds a video or a sound."""
    words = words_of(name)
    if not MEDIA_WORDS.isdisjoint(words):
        return METADATA_WORDS.isdisjoint(words)
    return isinstance(value, str) and _is_name(value) and suffix_of(value) in MEDIA_SUFFIXES


@functools.lru_cache(_NAMES_KEPT)
def is_ignored(name: str) -> bool:
    """Return True for a field that is ignored on purpose."""
    words = words_of(name)
    return name.lower() in IGNORED_NAMES or not words or words[-1] in IGNORED


def is_image_bytes(head: bytes) -> bool:
    """Return True if encoded bytes begin like an image of a common format."""
    if head[:2] == b"BM":
        return len(head) >= _SMALLEST_BMP and not any(head[6:10])
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    return head.startswith(_MAGIC) or head[4:12] in (b"ftypavif", b"ftypheic", b"ftypavis")


def holds_image(value: object, depth: int = 0) -> bool:
    """Return True if a value holds the content of an image: bytes, {bytes, path}, base64."""
    if isinstance(value, bytes):
        return is_image_bytes(value[:32])
    if isinstance(value, str):
        return is_encoded_image(value)
    if depth > _MAX_DEPTH:
        return False
    if isinstance(value, dict):
        if value.get("bytes") and "path" in value:
            return True
        return any(holds_image(entry, depth + 1) for entry in value.values())
    return isinstance(value, list) and any(holds_image(entry, depth + 1) for entry in value)


def holds_image_name(value: object, depth: int = 0) -> bool:
    """Return True if a value is, or contains, the file name or address of an image or a video."""
    if isinstance(value, str):
        return _is_name(value) and suffix_of(value) in _IMAGE_OR_MEDIA_SUFFIXES
    if depth > _MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return any(
            holds_image_name(entry, depth + 1)
            or (not is_empty(entry) and isinstance(name, str) and names_image(name))
            for name, entry in value.items()
        )
    return isinstance(value, list) and any(holds_image_name(entry, depth + 1) for entry in value)


def is_encoded_image(text: str) -> bool:
    """Return True for a data URI of an image, and for base64 text of a JPEG, PNG, WebP or GIF."""
    if text[:11].lower() == "data:image/":
        return True
    starts = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")
    return len(text) > 64 and text.startswith(starts) and " " not in text[:64] and "." not in text


def _is_name(text: str) -> bool:
    return len(text) <= _MAX_NAME and "\n" not in text.strip()
