"""Traces come back as they were written; a damaged line is named."""

import json
from pathlib import Path

import pytest

from megatron_croc.errors import DataError
from megatron_croc.rehearsal.trace import (
    Collective,
    Compute,
    Event,
    Exchange,
    Group,
    Header,
    HostRead,
    Mark,
    Memory,
    RecordEvent,
    Release,
    Synchronize,
    Transfer,
    Wait,
    WaitEvent,
)
from megatron_croc.rehearsal.trace_file import read_trace, write_trace

HEADER = Header(
    rank=5,
    world_size=16,
    sizes={"tp": 2, "cp": 1, "dp": 2, "pp": 4},
    groups=(Group(name="pp", ranks=(1, 5, 9, 13), is_ready=True),),
    stands_for=(5, 7),
    versions={"torch": "2.13"},
)
EVENTS: list[Event] = [
    Compute(operation="mm", kernels=2, flops=3.5, moved=4.0, part="language_model", seconds=1.0),
    Collective(
        kind="all_reduce", group="pp", dtype="bfloat16", bytes=8, root=5, work=0, place="a:1"
    ),
    Exchange(group="pp", transfers=(Transfer(direction="send", peer=9, storage=4),), batched=False),
    Wait(work=0),
    RecordEvent(number=0, stream=1),
    WaitEvent(number=0),
    Synchronize(recorded=0),
    HostRead(operation="item", place="b:2"),
    Memory(allocated=5, peak=9),
    Release(storage=4),
    Mark(phase="step", micro_batch=0, direction="backward", chunk=1),
]


def written(folder: Path) -> Path:
    write_trace(folder / "trace.jsonl", HEADER, EVENTS)
    return folder / "trace.jsonl"


def test_a_trace_comes_back(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path))
    assert trace.header == HEADER and list(trace.events) == EVENTS
    assert {type(event) for event in EVENTS} == set(Event.__args__)


def test_coordinates_follow_megatron_s_order() -> None:
    assert HEADER.coordinates(5) == {"tp": 1, "cp": 0, "dp": 0, "pp": 1}
    assert [HEADER.rank_at(HEADER.coordinates(rank)) for rank in range(16)] == list(range(16))


@pytest.mark.parametrize(
    ("line", "row", "message"),
    [
        (1, {"event": "header", "format": 2}, "line 1: .*a header of format 1 is needed"),
        (1, {"event": "compute"}, "line 1: .*header"),
        (2, {"event": "jump"}, "line 2: .*unknown event"),
        (2, {"event": "wait"}, "line 2"),
        (2, {"event": "wait", "work": "0"}, "line 2: .*work: '0' is of another type"),
        (2, {"event": "wait", "work": True}, "line 2: .*of another type"),
        (2, {"event": "wait", "work": 0, "speed": 1}, "line 2: .*unknown field speed"),
        (4, {"event": "exchange", "group": "pp", "transfers": [{"peer": 1}]}, "line 4"),
        (3, None, "line 3: .*not a JSON object"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: int, row: dict | None, message: str) -> None:
    path = written(tmp_path)
    lines = path.read_text().splitlines()
    lines[line - 1] = "{" if row is None else json.dumps(row)
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        read_trace(path)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(path)
    path.write_text("")
    with pytest.raises(DataError, match="an empty trace"):
        read_trace(path)
    sizes = {"event": "header", "rank": 0, "world_size": 3, "sizes": dict.fromkeys(HEADER.sizes, 2)}
    rest = {"groups": [], "stands_for": [], "format": 1}
    path.write_text(json.dumps({**sizes, **rest}))
    with pytest.raises(DataError, match="are not 3 ranks"):
        read_trace(path)
