"""Find the samples of a WebDataset tar in one sequential pass, without unpacking it.

    tar --tar_stream.py--> members --group by key--> samples: texts, images, other members

A member's key is its name up to the first dot of the last path part, as in WebDataset. Consecutive
members with one key are one sample. Names are labels only: no file is written under them. A member
that is not a plain file (link, device), or whose name leaves its folder, makes its sample unusable.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from megatron_croc.data.bad_samples import BadKind
from megatron_croc.data.prepare.tar_stream import TarDamage, TarMember, TarStream, tar_members
from megatron_croc.data.records.fields import IMAGE_SUFFIXES, is_image_bytes, suffix_of
from megatron_croc.data.store.storage import Storage

MAX_TEXT_BYTES = 64 << 20
"""Largest text member that is kept in memory."""

_HEAD_BYTES = 32
_TEXTS = ("json", "txt")
_ABOUT = frozenset(("readme", "license", "licence", "notice", "copying", "changelog"))
_PLAIN_SUFFIXES = frozenset(("md", "rst", "yaml", "yml", "toml", "cfg", "ini", "log", "sh", "py"))

Place = tuple[int, int]
"""(offset, length) of a member's bytes."""


@dataclass(kw_only=True)
class TarSample:
    """One sample of a tar."""

    key: str
    texts: dict[str, Place] = field(default_factory=dict)
    """Place of each text by suffix: json, txt, or with more dots such as caption.txt."""

    contents: dict[str, bytes] = field(default_factory=dict)
    """Bytes of each text, if the scan keeps them."""

    images: list[tuple[str, Place]] = field(default_factory=list)
    """(name, place) of each image, in the order of the tar."""

    others: list[str] = field(default_factory=list)
    """Names of the members that are not read."""

    fault: tuple[BadKind, str] | None = None
    """First fault found, as (kind, reason); None: usable."""

    @property
    def image_names(self) -> list[str]:
        """Names of the images, in the order of the tar."""
        return [name for name, _ in self.images]


@dataclass(kw_only=True)
class TarScan:
    """Content of a tar."""

    samples: list[TarSample]
    num_bytes: int
    sha256: str
    damage: str | None
    """Fault of the archive; samples before it are usable. None: no fault."""

    num_joined: int
    """Number of further tars that stand behind an end mark; they are read."""


def scan_tar(storage: Storage, *, keeps_texts: bool = False) -> TarScan:
    """Read a tar from end to end.

    Args:
        storage: the tar.
        keeps_texts: True: samples also hold the bytes of their texts.

    Raises:
        OSError: every attempt to read failed.
    """
    stream = TarStream(storage)
    samples: list[TarSample] = []
    seen: set[str] = set()
    damage = None
    try:
        for member in tar_members(stream):
            _add(samples, seen, member, stream, keeps_texts)
    except TarDamage as error:
        damage = str(error)
        # The last sample may lack the members after the damage.
        if error.cuts_sample and samples and samples[-1].fault is None:
            samples[-1].fault = ("damaged_tar", f"the archive breaks off: {damage}")
    whole = [part for sample in samples for part in _without_dots(sample)]
    return TarScan(
        samples=whole,
        num_bytes=stream.size,
        sha256=stream.finish(),
        damage=damage,
        num_joined=stream.num_joined,
    )


def _add(
    samples: list[TarSample],
    seen: set[str],
    member: TarMember,
    stream: TarStream,
    keeps_texts: bool,
) -> None:
    folder, name = _parts_of(member.name)
    stem, _, suffix = name.partition(".")
    suffix = suffix.lower()
    last = suffix.rpartition(".")[2]
    is_image = last in IMAGE_SUFFIXES and stem != ""  # a hidden 0.jpg of macOS is no image
    if not is_image and last not in _TEXTS and member.is_file:
        is_image = is_image_bytes(stream.take(min(_HEAD_BYTES, member.size)))
    if not suffix or not stem:
        # A README or a hidden file is no member of a sample; an image must not get lost.
        if is_image:
            name = f"{member.name!r:.80} is an image without key and suffix: name it key.suffix"
            samples.append(TarSample(key=member.name, fault=("record", name)))
        return
    key = folder + stem
    if not samples or samples[-1].key != key:
        samples.append(TarSample(key=key))
        if key in seen:
            samples[-1].fault = (
                "duplicate_key",
                f"key {key!r:.80} came before in this tar (a key ends at its first dot)",
            )
        seen.add(key)
    sample = samples[-1]
    if folder.startswith("/") or ".." in folder.split("/"):
        sample.fault = sample.fault or (
            "unsafe_member",
            f"name {member.name!r:.80} leaves its folder",
        )
    elif not member.is_file:
        sample.fault = sample.fault or (
            "unsafe_member",
            f"{member.name!r:.80} is not a plain file: pack the file itself "
            "(tar --dereference --hard-dereference)",
        )
    place = (member.offset, member.size)
    taken = (_parts_of(name)[1].partition(".")[2].lower() for name in sample.image_names)
    if suffix in sample.texts or suffix in taken:
        sample.fault = sample.fault or ("duplicate_key", f"{member.name!r:.80} is there twice")
    elif last in _TEXTS:
        sample.texts[suffix] = place
        if member.size > MAX_TEXT_BYTES:
            sample.fault = sample.fault or ("record", f"{member.name!r:.80} is too large a text")
        elif keeps_texts:
            sample.contents[suffix] = stream.take(member.size)
    elif is_image:
        sample.images.append((member.name, place))
    else:
        sample.others.append(member.name)


def _parts_of(name: str) -> tuple[str, str]:
    """Split a member's name into its folder, with a / at its end if there is one, and the rest.

    The same as pathlib does it, "./a//b.jpg" being "a/b.jpg", at a tenth of its cost.
    """
    if name[:1] in ("/", ".") or "//" in name or "/." in name:
        path = PurePosixPath(name)
        return str(path)[: len(str(path)) - len(path.name)], path.name
    cut = name.rfind("/") + 1
    return name[:cut], name[cut:]


def _is_no_sample(sample: TarSample) -> bool:
    """Return True for a README, a licence or another file of plain text that stands for itself."""
    if sample.images or sample.fault is not None:
        return False
    if PurePosixPath(sample.key).name.lower() in _ABOUT:
        return True
    suffixes = {suffix_of(name) for name in sample.others}
    return not sample.texts and suffixes <= _PLAIN_SUFFIXES


def _without_dots(sample: TarSample) -> Iterator[TarSample]:
    """Yield a sample; of members whose keys have dots, one faulty sample for each such key.

    "shot.v1.0.jpg, shot.v1.0.txt, shot.v1.1.jpg, .." have the one key "shot" in WebDataset. A
    single text such as "000.caption.txt" is the text of its sample.
    """
    if _is_no_sample(sample):
        return
    dotted = [suffix for suffix in sample.texts if "." in suffix]
    if not dotted or sample.fault is not None:
        yield sample
        return
    stems = {suffix.rpartition(".")[0] for suffix in dotted}
    images = [PurePosixPath(name).name.partition(".")[2].lower() for name in sample.image_names]
    if stems & {suffix.rpartition(".")[0] for suffix in images}:
        for stem in sorted(stems):
            name = PurePosixPath(f"{sample.key}.{stem}").name
            reason = (
                f"the key {name!r:.80} has dots, and WebDataset ends a key at its first dot: "
                f"rename its members to {name.replace('.', '_')!r:.80} and their suffixes"
            )
            yield TarSample(key=f"{sample.key}.{stem}", fault=("dotted_key", reason))
        return
    for kind in _TEXTS:
        candidates = [suffix for suffix in dotted if suffix.endswith(f".{kind}")]
        if kind not in sample.texts and len(candidates) == 1:
            sample.texts[kind] = sample.texts.pop(candidates[0])
            if candidates[0] in sample.contents:
                sample.contents[kind] = sample.contents.pop(candidates[0])
    for suffix in [suffix for suffix in sample.texts if "." in suffix]:
        del sample.texts[suffix]
        sample.others.append(f"{sample.key}.{suffix}")
    yield sample
