"""The search beside a GPU, on a stream whose work is done only when someone waits for it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from megatron_croc.model import matching
from megatron_croc.ops.assignment import assign, pairwise_cost
from megatron_croc.parallel import device
from tests.support.on_device import LateStream, OnDevice, on_device, plain

ONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.fixture
def late_stream(monkeypatch):
    """A process with a GPU: one stream, and copies off it that are late."""
    stream = LateStream()
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "_side_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(OnDevice, "copies", stream.queue.append)
    return stream


def test_the_search_waits_for_the_copy_however_fast_its_thread_is(late_stream, monkeypatch):
    class AtOnce:
        """A thread that runs before `submit` has returned."""

        def submit(self, search):
            found = search()
            return SimpleNamespace(result=lambda: found)

    monkeypatch.setattr(matching, "_searcher", AtOnce)
    generator = torch.Generator().manual_seed(0)
    tokens, pool = (torch.randn(s, generator=generator) for s in ((2, 12, 64), (32, 64)))
    config = SimpleNamespace(assign_mode="hungarian", assign_backend="cpu")
    matcher = matching.Matcher(config, SimpleNamespace(tp=ONE, cp=ONE))
    pending = matcher.start(on_device(tokens), on_device(pool), ahead=True)
    assert late_stream.num_done == len(late_stream.queue) == 1
    expected = assign(pairwise_cost(tokens, pool)).index
    assert torch.equal(plain(matcher.wait(pending).index), expected)
