"""The CPU stand-in: what megatron-core asks of CUDA is answered by the CPU."""

import subprocess
import sys

import pytest
import torch

from megatron_croc.parallel import device

pytestmark = pytest.mark.skipif(device.has_cuda(), reason="about machines without CUDA")


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        ("arange", (4,)),
        ("empty", (4,)),
        ("full", ((4,), 1.0)),
        ("ones", (4,)),
        ("rand", (4,)),
        ("randn", (4,)),
        ("tensor", ([1.0, 2.0],)),
        ("zeros", (4,)),
        ("empty_like", (torch.zeros(4),)),
        ("ones_like", (torch.zeros(4),)),
        ("zeros_like", (torch.zeros(4),)),
    ],
)
@pytest.mark.parametrize("where", ["cuda", "cuda:1", torch.device("cuda", 0), None, "cpu"])
def test_factories_make_cpu_tensors(factory, arguments, where):
    made = getattr(torch, factory)(*arguments, device=where)
    assert made.device.type == "cpu"
    assert getattr(torch, factory).__name__ == factory  # wrapped, not replaced


def test_pinned_memory_is_ordinary_memory():
    assert not torch.empty(4, pin_memory=True).is_pinned()


def test_other_devices_are_left_alone():
    assert torch.empty(4, device="meta").device.type == "meta"


def test_tensors_and_modules_stay_where_they_are():
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_tensor_types_carry_the_names_megatron_looks_for():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1, dtype=torch.int64).type() == "torch.LongTensor"
    # Converting with .type(dtype) still converts.
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_random_state_of_cuda_is_the_cpu_generator():
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.randn(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(3), first)
    torch.manual_seed(7)
    assert torch.equal(torch.randn(3), first)


def test_megatrons_named_generators_are_separate_streams(pg_collection):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    def draw():
        model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        with get_cuda_rng_tracker().fork():
            inside = torch.randn(3)
        outside = torch.randn(3)
        with get_cuda_rng_tracker().fork():
            return inside, outside, torch.randn(3)

    first, second = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_own_generators_do_not_touch_the_global_one():
    before = torch.get_rng_state()
    generator = device.manual_generator(3)
    drawn = torch.empty(4).uniform_(generator=generator)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn, torch.empty(4).uniform_(generator=device.manual_generator(3)))


def test_answers_without_cuda():
    assert device.current_device() == torch.device("cpu")
    assert device.distributed_backend() == "gloo"
    assert device.device_name() == "cpu" and device.max_memory_allocated() == 0
    device.synchronize(), device.set_local_device(3)


def test_installing_twice_changes_nothing():
    wrapped = torch.zeros
    device.install_cpu_stand_in()
    assert torch.zeros is wrapped


def test_megatron_is_not_touched_where_nothing_of_parallel_is_imported():
    """The stand-in belongs to megatron_croc.parallel; configuration alone must not install it."""
    code = (
        "import torch; before = torch.zeros; import megatron_croc.config.run, megatron_croc.ops;"
        "assert torch.zeros is before; import megatron_croc.parallel;"
        "assert torch.zeros is not before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_moments_on_a_cpu_are_host_seconds(monkeypatch):
    monkeypatch.setattr(device.time, "perf_counter", lambda: 7.0)
    begin = device.moment()
    monkeypatch.setattr(device.time, "perf_counter", lambda: 9.5)
    assert device.seconds_between(begin, device.moment()) == 2.5


def test_moments_on_a_gpu_are_events_that_only_reading_waits_for(monkeypatch):
    calls = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, later: "Event") -> float:
            return 1500.0  # milliseconds

    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    begin, end = device.moment(), device.moment()
    assert calls == ["record", "record"]
    assert device.seconds_between(begin, end) == 1.5
    assert calls == ["record", "record", "synchronize"]
