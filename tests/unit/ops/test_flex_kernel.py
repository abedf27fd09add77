"""Choice of the kernel of FlexAttention."""

import pytest
import torch

from megatron_croc.ops.attention import flex
from megatron_croc.ops.mixed_mask import MixedMask
from tests.support.on_device import on_device

FLASH = {"BACKEND": "FLASH"}


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU with flash-attn-4 installed."""
    monkeypatch.setattr(flex, "_has_flash_attention_4", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def query(dtype=torch.bfloat16, dim=128):
    return on_device(torch.zeros(4, 2, dim, dtype=dtype))


def test_hopper_takes_flash_attention_4(hopper):
    assert flex.kernel_options(query()) == FLASH
    assert flex.kernel_options(query(torch.float16, 64)) == FLASH


@pytest.mark.parametrize(
    ("tensors", "change"),
    [
        (dict(dtype=torch.float32), {}),
        (dict(dim=192), {}),
        ({}, {"torch.cuda.get_device_capability": lambda _: (8, 0)}),
        ({}, {"torch.cuda.get_device_capability": lambda _: (10, 0)}),
        ({}, {"torch.are_deterministic_algorithms_enabled": lambda: True}),
        ({}, {"torch.nn.attention.flex_attention.FlexKernelOptions.__annotations__": {}}),
        ({}, {"megatron_croc.ops.attention.flex._has_flash_attention_4": lambda: False}),
    ],
    ids=["float32", "head dim", "Ampere", "Blackwell", "deterministic", "older torch", "no wheel"],
)
def test_everything_else_is_left_to_torch(hopper, monkeypatch, tensors, change):
    for name, value in change.items():
        monkeypatch.setattr(name, value)
    assert flex.kernel_options(query(**tensors)) is None


def test_without_the_wheel_it_is_known_to_be_missing(monkeypatch):
    flex._has_flash_attention_4.cache_clear()
    assert flex._has_flash_attention_4() is False  # flash_attn itself is not there either
    flex._has_flash_attention_4.cache_clear()


def test_the_kernel_gets_the_options(hopper, monkeypatch):
    seen = []

    def kernel(q, *_, kernel_options, **__):
        seen.append(kernel_options)
        return q

    monkeypatch.setattr(flex, "_compiled", lambda: kernel)
    monkeypatch.setattr(flex, "flex_attention", kernel)
    mask = MixedMask.build([0, 4])
    q = query()
    flex.attend_flex(q, q, q, mask, softmax_scale=1.0)
    plain = torch.zeros(4, 2, 128)
    flex.attend_flex(plain, plain, plain, mask, softmax_scale=1.0)
    assert seen == [FLASH, None]
