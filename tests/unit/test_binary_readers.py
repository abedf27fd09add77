"""Readers of tars, checkpoint indexes and tokenizers: a damaged file is refused in one line."""

import copy
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_croc.checkpoint.safe_reading import read_index
from megatron_croc.convert.checkpoint_reader import CheckpointReader
from megatron_croc.data.demo.dataset import train_tokenizer
from megatron_croc.data.prepare.inputs.tars import TarInput
from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.prepare.tar_index import index_tar
from megatron_croc.data.prepare.tar_scan import scan_tar
from megatron_croc.data.sample.legacy import decide_legacy
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.store.storage import open_storage
from megatron_croc.errors import CheckpointError, DataError
from tests.unit.data.small_samples import jpeg
from tests.unit.test_file_reading import JUNK, mutations, outcome

BLOCK = 512


def attack(path: Path, changed: st.SearchStrategy[bytes], read: Callable, examples: int) -> int:
    """Number of changed files that a reader refuses; none may end in another error."""
    content, refused = path.read_bytes(), 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(changed)
    def run(new: bytes) -> None:
        nonlocal refused
        path.write_bytes(new)
        refused += bool(outcome(read, path.parent))

    try:
        run()
    finally:
        path.write_bytes(content)
    return refused


# Tars


def write_tar(path: Path) -> None:
    """Members with a pax header, GNU's long name, an image, texts, a link and a folder."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            ("0.jpg", jpeg(1)),
            ("0.json", b'{"caption": "a"}'),
            ("\u00e9.txt", b"b"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (("l" * 120 + ".txt", tarfile.REGTYPE), ("2.txt", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, 0
            tar.addfile(member)


def headers_of(content: bytes) -> list[int]:
    """Offsets of the blocks that look like a header."""
    blocks = range(0, len(content), BLOCK)
    return [begin for begin in blocks if content[begin + 257 : begin + 262] == b"ustar"]


def changed_headers(content: bytes) -> st.SearchStrategy[bytes]:
    """The tar with fields of a header overwritten, and the checksum made to fit."""
    fields = {"name": (0, 100), "size": (124, 12), "type": (156, 1), "magic": (257, 8),
              "prefix": (345, 155)}  # fmt: skip
    sizes = [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"7" * 12, b"-0000000001\0", b"0_1\0", bytes(12)]
    names = [b"..\0", b"/etc/passwd\0", b"a\x1b[31m.txt\0", *(bytes([kind]) for kind in b"xgLK5SV")]
    values = st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([*sizes, *names]))
    change = st.tuples(
        st.sampled_from(headers_of(content)), st.sampled_from(sorted(fields)), values
    )

    def apply(changes: list[tuple[int, str, bytes]]) -> bytes:
        new = bytearray(content)
        for begin, name, value in changes:
            place, length = fields[name]
            new[begin + place : begin + place + min(length, len(value))] = value[:length]
            new[begin + 148 : begin + 156] = b" " * 8
            new[begin + 148 : begin + 156] = b"%06o\0 " % sum(new[begin : begin + BLOCK])
        return bytes(new)

    return st.lists(change, min_size=1, max_size=3).map(apply)


def pax_bodies(content: bytes) -> st.SearchStrategy[bytes]:
    """The tar with its pax records overwritten by others of the same length."""
    begin = headers_of(content)[2] + BLOCK
    assert b" path=" in content[begin : begin + BLOCK]
    keys, values = (
        st.sampled_from(["path", "size", "x"]),
        st.sampled_from(
            ["\u0662", "-1", "9" * 30, "", "../a.txt", "a\0b.txt", "\x1b[2J.txt", "1e3", "0"]
        ),
    )
    lengths = st.sampled_from([b"", b"0", b"-1", b"5", b"999999999", b"9" * 20])

    def apply(key: str, value: str, length: bytes) -> bytes:
        record = b"%s %s=%s\n" % (length, key.encode(), value.encode())
        if not length:
            record = b"%d%s" % (len(record) + 2, record)
        return content[:begin] + record[:BLOCK].ljust(BLOCK, b"\0") + content[begin + BLOCK :]

    return st.builds(apply, keys, values, lengths)


def read_tar(folder: Path) -> None:
    """Read and index the tar; nothing that is found may lie outside of it."""
    path, out = folder / "a.tar", folder / "out"
    size = path.stat().st_size
    for sample in scan_tar(open_storage(path), keeps_texts=True).samples:
        for offset, length in [*sample.texts.values(), *(place for _, place in sample.images)]:
            assert offset >= 0 and length >= 0 and offset + length <= size
        unsafe = sample.key.startswith("/") or ".." in sample.key.split("/")
        assert sample.fault is not None or not unsafe, sample.key
    records = TarInput(str(path))
    made = list(records.slice(0, records.num_records).read())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    result = index_tar(out, 0, str(path))
    assert len(made) == result.num_records == result.info.num_samples + len(result.skipped)
    for skipped in result.skipped:
        assert len(skipped.reason.splitlines()) == 1 and len(skipped.reason) < 400


def fuzz_tars(folder: Path, examples: int) -> None:
    write_tar(folder / "a.tar")
    read_tar(folder)
    content = (folder / "a.tar").read_bytes()
    for changed in (changed_headers(content), pax_bodies(content), mutations(content)):
        attack(folder / "a.tar", changed, read_tar, examples)


def test_headers_of_tars(tmp_path: Path):
    fuzz_tars(tmp_path, 12)


def test_names_of_members_stay_on_one_line(tmp_path: Path):
    """Reasons and notes quote names, which may hold ends of lines and commands to a terminal."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.txt", "0.a\nb\x1b[31m", "1.c\n\u2028d", "\n.e"):
            member, data = tarfile.TarInfo(name), jpeg(1) if name == "0.jpg" else b"a"
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "out").mkdir()
    job = Preprocessor(
        input_path=tmp_path / "a.tar", image_folder=None, output=tmp_path / "out",
        samples_per_shard=9,
    )  # fmt: skip
    list(job.make_shards(1))
    lines = list(job.finish().lines())
    assert len(lines) == 5, lines
    assert all(line.isprintable() for line in lines), lines
    assert any("only 1.c\\n\\u2028d: store" in line for line in lines)
    assert any("member .a\\nb\\x1b[31m is not read" in line for line in lines)


# Indexes of checkpoints


def write_checkpoint(folder: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def places_of(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container or object, key or attribute) of every part of an index."""
    if isinstance(node, dict | list):
        entries = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
    else:
        entries = list(getattr(node, "__dict__", {}).items())
    for key, child in entries:
        yield node, key
        yield from places_of(child)


def changed_indexes(content: bytes) -> st.SearchStrategy[bytes]:
    """The index with one part replaced by junk, or left out."""
    good = pickle.loads(content)
    values = [*JUNK, (-1, 3), (2.0, 3), (2,), (2, 2**62), "LEFT OUT"]

    def apply(number: int, junk: Any) -> bytes:
        index = copy.deepcopy(good)
        places = list(places_of(index))
        parent, key = places[number % len(places)]
        inside = parent if isinstance(parent, dict | list) else parent.__dict__
        if isinstance(junk, str) and junk == "LEFT OUT":
            del inside[key]
        else:
            inside[key] = junk
        try:
            return pickle.dumps(index)
        except (AttributeError, RuntimeError):  # torch cannot store such properties
            return b""

    return st.builds(apply, st.integers(0, 200), st.sampled_from(values))


def read_checkpoint(folder: Path) -> None:
    reader = CheckpointReader(folder)
    for key in reader.tensors:
        reader.dtype(key)
        whole = reader.read(key)
        assert tuple(whole.shape) == reader.shape(key)


def fuzz_indexes(folder: Path, examples: int) -> None:
    write_checkpoint(folder)
    read_checkpoint(folder)
    content = (folder / ".metadata").read_bytes()
    for changed in (changed_indexes(content), mutations(content)):
        assert attack(folder / ".metadata", changed, read_checkpoint, examples)


def test_indexes_of_checkpoints(tmp_path: Path):
    fuzz_indexes(tmp_path, 60)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: setattr(index, "storage_data", [1]), "damaged"),
        (lambda index: setattr(index, "storage_data", None), "damaged"),
        (lambda index: setattr(index, "state_dict_metadata", None), "damaged"),
        (lambda index: index.state_dict_metadata.update(c=3), "damaged"),
        (
            lambda index: setattr(index.state_dict_metadata["b"], "size", (-4,)),
            r"\(-4,\) are no lengths",
        ),
        (
            lambda index: setattr(index.state_dict_metadata["b"], "size", (3,)),
            r"a piece of 'b' ends at \[4\], its shape is \[3\]",
        ),
        (lambda index: vars(next(iter(index.storage_data.values()))).clear(), "damaged"),
    ],
)
def test_an_index_of_other_parts(tmp_path: Path, change: Callable, said: str):
    write_checkpoint(tmp_path)
    index = read_index(tmp_path)
    change(index)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        read_index(tmp_path)


# Tokenizers


def write_tokenizer(folder: Path) -> None:
    """A small tokenizer of Hugging Face's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "car": 4, "\n": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "transformers_version": "4.30.2", "model_max_length": 2048}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"transformers_version": "4.30.2"}')


def load_tokenizer(folder: Path) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder))
    tokenizer.encode("a car", follows="text")


def fuzz_tokenizers(folder: Path, examples: int, names: tuple[str, ...], read: Callable) -> None:
    write_tokenizer(folder)
    read(folder)
    for name in names:
        attack(folder / name, mutations((folder / name).read_bytes()), read, examples)


CONFIGS = ("tokenizer_config.json", "tokenizer.json", "config.json")


def test_settings_of_tokenizers(tmp_path: Path):
    fuzz_tokenizers(tmp_path, 40, CONFIGS, decide_legacy)
    for version in ("\u00b2.1", "9" * 5000, [], {"a": 1}, None, -5):
        text = json.dumps({"transformers_version": version, "tokenizer_class": ["Llama"]})
        (tmp_path / "tokenizer_config.json").write_text(text)
        decide_legacy(tmp_path)
    scheme = {"type": "Metaspace", "prepend_scheme": ["first"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": scheme}))
    decide_legacy(tmp_path)


def test_tokenizers_that_no_library_reads(tmp_path: Path):
    write_tokenizer(tmp_path)
    for text in ("{}", "[]", '{"model": 3}', "", '{"version": "1.0", "model": null}'):
        (tmp_path / "tokenizer.json").write_text(text)
        (tmp_path / "tokenizer_config.json").write_text("{}")
        with pytest.raises(DataError, match=str(tmp_path)):
            load_tokenizer(tmp_path)
    content = train_tokenizer(seed=1)
    for damaged in (b"", content[:100], content[: len(content) // 2], b"\xff" * 100):
        (tmp_path / "a.model").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.model is not a SentencePiece model: .*again") as e:
            build_tokenizer("SentencePieceTokenizer", str(tmp_path / "a.model"))
        assert len(str(e.value).splitlines()) == 1


@pytest.mark.slow
def test_all_for_long(tmp_path: Path):
    for name in ("tar", "index", "tokenizer"):
        (tmp_path / name).mkdir()
    fuzz_tars(tmp_path / "tar", 1000)
    fuzz_indexes(tmp_path / "index", 1000)
    fuzz_tokenizers(tmp_path / "tokenizer", 150, CONFIGS[:2], load_tokenizer)
