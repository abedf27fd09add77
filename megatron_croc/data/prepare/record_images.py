"""Images of a record: read, checked by their headers, looked up in the image folder."""

import errno
import functools
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.prepare.made_from import SourceFiles
from megatron_croc.data.records.fields import IMAGE_SUFFIXES, suffix_of
from megatron_croc.data.sample.image_header import ImageError, check_shape, read_header
from megatron_croc.errors import DataError, first_line

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Extension of an image's member by its format; the name of its file may be wrong."""

_COMMON_SUFFIXES = ("jpg", "jpeg", "png", "gif", "webp", "JPG")
_LFS_POINTER = b"version https://git"
_MAX_LOOKED_AT = 1000
"""Entries of an image folder among which an archive is looked for."""


@dataclass(frozen=True, kw_only=True)
class RecordImages:
    """Reader of the images of one record."""

    name: str
    """Name of the record, for errors."""

    folder: Path | None
    """Folder of image names; None: there is none."""

    image_aspect_ratio: Literal["pad", "square"]
    """Setting of training, which refuses images that are too long for it."""

    files: SourceFiles
    """Notes the files that were looked for."""

    notes: dict[str, str]
    """Gets the decisions for the report, each with an example."""

    def read(self, image: str | bytes | tuple[str, bytes]) -> tuple[str, bytes]:
        """Return (extension, bytes) of an image.

        Args:
            image: name of a file, bytes, or (name, bytes) of a member.

        Raises:
            BadSampleError: there is no such file, or training would refuse the image.
            DataError: the file cannot be read now.
        """
        label, data = "image", image
        if isinstance(image, str):
            label, data = f"image {image}", self._read_named(image)
        elif isinstance(image, tuple):
            label, data = f"image {image[0]}", image[1]
        assert isinstance(data, bytes)
        try:
            header = read_header(data)
            check_shape(header.width, header.height, self.image_aspect_ratio)
        except ImageError as error:
            cause = "a pointer of Git LFS: run git lfs pull" if data[:19] == _LFS_POINTER else error
            raise BadSampleError(self.name, "image", f"{label}: {cause}") from error
        return EXTENSIONS.get(header.format, header.format.lower()), data

    def _read_named(self, image: str) -> bytes:
        name, image_folder, files = self.name, self.folder, self.files
        if "://" in image and re.match(r"[a-z0-9]+://", image):
            raise BadSampleError(
                name,
                "missing_image",
                f"image {image:.120} is an address and not fetched: download it and name the file",
            )
        if image_folder is None:
            raise BadSampleError(
                name,
                "missing_image",
                f"image {image:.120} is a name: say --image-folder to look it up",
            )
        place = PurePosixPath(image)
        if place.is_absolute() and place.is_relative_to(image_folder.absolute()):
            place = place.relative_to(image_folder.absolute())
        if place.is_absolute() or (".." in image and ".." in place.parts):
            raise BadSampleError(
                name, "missing_image", f"image {image:.120} lies outside the image folder"
            )
        try:
            return files.read(image_folder / place)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            if (other := _other_suffix(image_folder / place, files)) is not None:
                note = "file found under another suffix than its record says"
                self.notes.setdefault(note, f"{image} is {other.name}")
                return files.read(other)
            reason = f"image {image:.120} is not in the image folder"
            if "\\" in image:
                reason += ": write / between folders, not \\"
            if (packed := _archive_in(image_folder)) is not None:
                reason += f"; unpack {packed} there first"
            raise BadSampleError(name, "missing_image", reason) from error
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ELOOP:
                reason = f"image {image:.120} is a link that leads in a circle"
                raise BadSampleError(name, "missing_image", reason) from error
            if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
                raise DataError(
                    f"image {image}: {first_line(error)}; run the command again"
                ) from error
            raise BadSampleError(
                name, "missing_image", f"image {image!r:.60} cannot be a file name"
            ) from error


@functools.lru_cache(maxsize=64)
def _archive_in(folder: Path) -> str | None:
    """Return the name of an archive in a folder, whose images are not files yet."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry in itertools.islice(entries, _MAX_LOOKED_AT))
        return next((name for name in names if name.endswith((".zip", ".tar", ".tar.gz"))), None)


def _other_suffix(path: Path, files: SourceFiles) -> Path | None:
    """Return the one image of this name with another suffix: OCR-VQA's GIFs are listed as .jpg."""
    if suffix_of(path.name) not in IMAGE_SUFFIXES:
        return None
    others = [path.with_suffix(f".{suffix}") for suffix in _COMMON_SUFFIXES]
    for other in others:
        files.note(other)
    there = [other for other in others if other != path and other.is_file()]
    return there[0] if len(there) == 1 else None
