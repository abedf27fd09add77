"""Recorders of both backends, as torch dumps them; gloo's own is read in test_faults.py."""

import json

import pytest

from megatron_croc.parallel import flight_recorder


def entry(name: str, state: str) -> dict:
    return {"profiling_name": name, "state": state, "process_group": ["5", "dp"]}


DONE = entry("nccl:all_reduce", "completed")
RUNNING = entry("nccl:_reduce_scatter_base", "started")
QUEUED = entry("nccl:_all_gather_base", "scheduled")
GLOO = entry("gloo:broadcast", "scheduled")


@pytest.mark.parametrize(
    ("nccl", "gloo", "found"),
    [
        ([DONE, QUEUED], [GLOO], "nccl:_all_gather_base"),
        ([DONE, RUNNING, QUEUED], [], "nccl:_reduce_scatter_base"),
        ([DONE], [GLOO], "gloo:broadcast"),
        (None, [GLOO], "gloo:broadcast"),  # a build without NCCL
        ([QUEUED], None, "nccl:_all_gather_base"),  # torch before 2.8
        ([DONE], [], None),
    ],
)
def test_the_collective_that_did_not_complete(monkeypatch, nccl, gloo, found):
    for name, entries in (("_dump_nccl_trace_json", nccl), ("_dump_fr_trace_json", gloo)):
        module = flight_recorder.distributed_c10d
        if entries is None:
            monkeypatch.delattr(module, name, raising=False)
        else:
            answer = json.dumps({"entries": entries}).encode()
            monkeypatch.setattr(module, name, lambda answer=answer: answer, raising=False)
    told = flight_recorder.last_collective()
    assert told == (found and f"{found} over group ['5', 'dp']")
