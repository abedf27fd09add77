"""Every reader of a file from disk: a hostile or damaged file is refused in one short line."""

import json
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_croc.checkpoint.manifest import find_damage
from megatron_croc.checkpoint.state import LATEST_FILE, TrainState, resume_candidates
from megatron_croc.config.base import changes_from_tree, read_yaml
from megatron_croc.config.run import RunConfig
from megatron_croc.convert.tensor_files import open_tensors
from megatron_croc.data.order.blend import read_blend
from megatron_croc.data.order.row_plan import OrderState
from megatron_croc.data.store.manifest import read_manifest
from megatron_croc.data.store.shard_writer import ShardWriter
from megatron_croc.data.store.shard_writer import write_manifest as write_shards
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.data.store.stored_array import open_array
from megatron_croc.errors import CheckpointError, CrocError, DataError
from megatron_croc.evaluation.questions import read_questions
from megatron_croc.file_reading import MAX_DEPTH, UnreadableError, build, read_json
from megatron_croc.monitoring.live.reading import read_lines
from megatron_croc.monitoring.run_report.stages import read_metrics
from megatron_croc.scaling.launch import read_metrics as read_grid_metrics
from megatron_croc.training.replay import read_report
from megatron_croc.training.reporting.metrics_log import drop_undone_steps
from megatron_croc.training.safety.heartbeat import Beat, read_beat

Reader = Callable[[Path], object]


def make_shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, 0) as writer:
        for number in range(3):
            writer.add({"caption": f"caption {number}"}, [])
    assert writer.info is not None
    write_shards(folder, [writer.info])
    return folder


def config(folder: Path) -> object:
    return changes_from_tree(RunConfig, read_yaml(folder / "run.yaml"), [], source="run.yaml")


def blend(folder: Path) -> object:
    return read_blend([str(folder / "blend.yaml")])


REPORT = {
    "iteration": 3,
    "train_iters": 9,
    "reason": "loss is nan",
    "loss": "nan",
    "grad_norm": None,
    "ranks": [{"rank": 1, "bad_weights": []}],
    "run": {"stage": "finetune"},
}
ORDER = OrderState(
    identity="x", sources=("a",), num_samples=(5,), consumed=(2,), window_start=(0,), rows_taken=1
)
ROWS = "".join(json.dumps({"iteration": n, "loss": 2.0 / n}) + "\n" for n in range(1, 5))

READERS: dict[str, tuple[str, Reader]] = {
    "settings": ("run.yaml", config),
    "blend": ("blend.yaml", blend),
    "tracker": (LATEST_FILE, resume_candidates),
    "state of a run": ("train_state.json", TrainState.load),
    "manifest of a checkpoint": ("manifest.json", find_damage),
    "manifest of a dataset": ("set/manifest.json", lambda f: ShardedDataset(f / "set", roots=())),
    "heartbeat": ("rank_00000.json", lambda folder: read_beat(folder / "rank_00000.json")),
    "report of a step": ("report.json", lambda folder: read_report(folder / "report.json")),
    "metrics, report": ("metrics.jsonl", lambda folder: read_metrics(folder / "metrics.jsonl")),
    "metrics, monitor": ("metrics.jsonl", lambda folder: read_lines(folder / "metrics.jsonl")),
    "metrics, grid": ("metrics.jsonl", read_grid_metrics),
    "metrics, resume": ("metrics.jsonl", lambda folder: drop_undone_steps(folder, 2)),
    "safetensors": ("model.safetensors", open_tensors),
    "array": ("rows.npy", lambda folder: open_array(folder / "rows.npy")),
    "questions": ("questions.jsonl", lambda folder: read_questions(folder / "questions.jsonl")),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder in which every reader finds what it reads."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "run.yaml").write_text("stage: finetune\ntraining:\n  seed: 3\n  train_iters: 9\n")
    make_shards(folder / "set")
    (folder / "blend.yaml").write_text("- {path: set, weight: 2}\n")
    TrainState(iteration=4, stage="finetune", recent_losses=[1.5], order=ORDER).save(folder)
    (folder / "rank_00000.json").write_text(json.dumps(asdict(Beat(rank=0, host="a", pid=1))))
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "metrics.jsonl").write_text(ROWS)
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, folder / "model.safetensors")
    np.save(folder / "rows.npy", np.arange(6).reshape(2, 3))
    (folder / "questions.jsonl").write_text(json.dumps({"text": "a question"}) + "\n")
    (folder / "w").write_bytes(b"1")
    (folder / "manifest.json").write_text(
        json.dumps({"piece_bytes": 64 * 2**20, "files": {"w": {"bytes": 1, "sha256": ["x"]}}})
    )
    (folder / LATEST_FILE).write_text("4\n")
    return folder


def outcome(reader: Reader, folder: Path) -> str:
    """The error of a reader, which must be one short line; "" if it accepts the file."""
    try:
        reader(folder)
    except CrocError as error:
        said = str(error)
        assert len(said.splitlines()) == 1 and len(said) < 600, said
        assert said.isprintable(), said
        return said
    return ""


@pytest.mark.parametrize("name", READERS)
def test_the_good_files_are_read(good: Path, name: str):
    said = outcome(READERS[name][1], good)
    assert said == "" or name == "tracker"


JUNK: list[Any] = [
    None,
    True,
    "12",
    -1,
    2**63,
    1e999,
    10**400,
    [],
    {},
    [[]],
    "\x1b[31m",
    "²",
    "../x",
]


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes near the good ones: cut, overwritten, with a leaf of junk, or anything at all."""
    cut = st.integers(0, len(content)).map(lambda n: content[:n])
    places = st.tuples(st.integers(0, max(len(content) - 1, 0)), st.binary(min_size=1, max_size=9))
    overwritten = st.lists(places, min_size=1, max_size=3).map(lambda edits: _edit(content, edits))
    junk = st.tuples(st.integers(0, 60), st.sampled_from(JUNK)).map(
        lambda choice: _with_junk(content, *choice)
    )
    nested = st.sampled_from([b"[", b'{"a":', b'[{"iteration":']).map(lambda part: part * 30_000)
    return st.one_of(cut, overwritten, junk, nested, st.binary(max_size=64))


def _edit(content: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(content)
    for place, new in edits:
        changed[place : place + len(new)] = new
    return bytes(changed)


def _with_junk(content: bytes, number: int, junk: Any) -> bytes:
    """Replace the `number`-th leaf of the first JSON object by junk."""
    if content[:1] != b"{":
        head = struct.unpack("<Q", content[:8])[0] if len(content) > 8 else 0
        if not 0 < head < len(content) or content[8:9] != b"{":
            return content.replace(b"3", json.dumps(junk).encode(), 1)
        new = _with_junk(content[8 : 8 + head].rstrip(), number, junk)
        return struct.pack("<Q", len(new)) + new + content[8 + head :]
    first, _, rest = content.partition(b"\n") if content.count(b"}\n{") else (content, b"", b"")
    tree = json.loads(first)
    places = list(_places(tree))
    parent, key = places[number % len(places)]
    parent[key] = junk
    return json.dumps(tree).encode() + (b"\n" + rest if rest else b"")


def _places(tree: Any):
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(child, dict | list):
            yield from _places(child)


def fuzz(good: Path, tmp_path: Path, name: str, examples: int) -> None:
    file, reader = READERS[name]
    path, content = good / file, (good / file).read_bytes()
    refused = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(mutations(content))
    def attack(changed: bytes) -> None:
        nonlocal refused
        path.write_bytes(changed)
        refused += bool(outcome(reader, good))
        if name == "safetensors":
            _as_strict_as_the_library(path, reader, good)

    try:
        attack()
    finally:
        path.write_bytes(content)
    assert (
        refused or name in ("heartbeat", "manifest of a checkpoint", "tracker") or "metrics" in name
    )


def _as_strict_as_the_library(path: Path, reader: Reader, folder: Path) -> None:
    """A file that its own library refuses is refused here."""
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                file.get_tensor(key)
    except (SafetensorError, ValueError, KeyError, RuntimeError):
        assert outcome(reader, folder), path.read_bytes()


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(good: Path, tmp_path: Path, name: str):
    fuzz(good, tmp_path, name, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_mutated_files_for_long(good: Path, tmp_path: Path, name: str):
    fuzz(good, tmp_path, name, 300)


def test_depth_and_kinds(tmp_path: Path):
    path = tmp_path / "a.json"
    for depth in (MAX_DEPTH, MAX_DEPTH + 2):
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        if depth == MAX_DEPTH:
            read_json(path)
        else:
            with pytest.raises(UnreadableError, match="nested more than 64 levels"):
                read_json(path)
    for junk in (True, "12", -1, 2**63, 1.0, None, [1]):
        with pytest.raises(UnreadableError, match="iteration must be a count"):
            build(Beat, {"iteration": junk})


def header(tmp_path: Path, entries: dict, data: int) -> Path:
    text = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "data", "said"),
    [
        ({"b": {"data_offsets": [4, 12]}}, 12, "the one before it ends at"),
        ({"b": {"data_offsets": [12, 20]}}, 20, "the one before it ends at"),
        ({"b": {"shape": [-1, -2]}}, 16, "has shape"),
        ({"b": {"shape": [2.0]}}, 16, "has shape"),
        ({"b": {"shape": [True, 2]}}, 16, "has shape"),
        ({}, 17, "1 bytes behind the last tensor"),
        ({}, 15, "truncated: tensor b ends at byte"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path: Path, changes: dict, data: int, said: str):
    entries = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]}
        | changes.get(name, {})
        for name, start in (("a", 0), ("b", 8))
    }
    with pytest.raises(CheckpointError, match=said):
        open_tensors(header(tmp_path, entries, data))
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "model.safetensors", "pt")


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_dataset_stays_in_its_folder_or_in_named_ones(tmp_path: Path):
    folder = make_shards(tmp_path / "set")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    tar = folder / "shard-000000.tar"
    tar.rename(outside / tar.name)
    for name in (str(outside / tar.name), "../elsewhere/shard-000000.tar"):
        rewrite(folder, lambda content, name=name: content["shards"][0].update(tar=name))
        with pytest.raises(DataError, match=r"outside of it: .* --data-roots .*elsewhere"):
            ShardedDataset(folder, roots=())
        assert len(ShardedDataset(folder, roots=[str(outside)])) == 3
    tar.symlink_to(outside / tar.name)
    rewrite(folder, lambda content: content["shards"][0].update(tar=tar.name))
    with pytest.raises(DataError, match="outside of it"):
        ShardedDataset(folder, roots=())
    rewrite(folder, lambda content: content["shards"][0].update(tar="/etc/passwd"))
    with pytest.raises(DataError, match="names /etc/passwd, which is outside of it"):
        ShardedDataset(folder, roots=[str(outside)])
    entry = dict.fromkeys(("sha256", "tokenizer_sha256", "tokenizer_model"), "x")
    entry |= {"file": "../lengths.npy", "conversation_template": "v1"}
    rewrite(folder, lambda content: content.update(lengths=[entry]))
    with pytest.raises(DataError, match="not in its folder"):
        read_manifest(folder)


@pytest.mark.parametrize("junk", ["3", 3.0, True, -3, 2**63])
def test_counts_are_whole_numbers(tmp_path: Path, junk: object):
    folder = make_shards(tmp_path / "set")
    rewrite(folder, lambda content: content["shards"][0].update(num_samples=junk))
    with pytest.raises(DataError, match="num_samples must be a count"):
        read_manifest(folder)


def test_an_index_past_the_largest_number(tmp_path: Path):
    import hashlib

    folder = make_shards(tmp_path / "set")
    index = folder / "shard-000000.idx.npy"
    rows = np.load(index)
    rows[-1, 1:] = 2**62 + 7, 2**62  # their sum is negative in int64
    np.save(index, rows)
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    rewrite(folder, lambda content: content["shards"][0].update(idx_sha256=digest))
    with pytest.raises(DataError, match="names bytes that no file has"):
        ShardedDataset(folder)


def test_escape_codes_do_not_reach_the_terminal(tmp_path: Path):
    path = tmp_path / "rank_00000.json"
    path.write_text(json.dumps(asdict(Beat(rank=0, host="\x1b[2Jnode", pid=1))))
    beat = read_beat(path)
    assert beat is not None and beat.host == "\\x1b[2Jnode"
    assert str(CheckpointError("a\x1b[2Jb\nc")) == "a\\x1b[2Jb\nc"


def test_trackers(tmp_path: Path):
    for content in (b"\xff\xfe4\n", b"../../etc", b"a/b", "٤".encode(), b"9" * 4000, b"a\x1b[2J"):
        (tmp_path / LATEST_FILE).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"write the name .* into {LATEST_FILE}"):
            resume_candidates(tmp_path)
