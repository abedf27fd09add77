"""SmoothL1 against numbers worked out by hand and against its formula in float64."""

import pytest
import torch

from megatron_croc.ops.reconstruction_loss import reconstruction_loss_sum


def test_worked_out_by_hand():
    prediction = torch.tensor([[[0.005, -0.5, 1.0, 2.0]]])
    target = torch.tensor([[[0.0, 0.0, 1.0, 2.01]]])
    # 0.5 * 0.005^2 / 0.01; 0.5 - 0.005; 0; exactly at beta: 0.5 * 0.01.
    expected = 0.00125 + 0.495 + 0.0 + 0.005
    ours = reconstruction_loss_sum(prediction, target, beta=0.01)
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    assert ours.shape == () and ours.dtype == torch.float32


@pytest.mark.parametrize("beta", [0.01, 1.0])
def test_sum_and_gradient_are_the_formula(beta):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 5, 8, generator=generator).requires_grad_()
    target = torch.randn(2, 5, 8, generator=generator)
    ours = reconstruction_loss_sum(prediction, target, beta=beta)
    ours.backward()
    d = (prediction.detach() - target).double()
    quadratic = 0.5 * d**2 / beta
    expected = torch.where(d.abs() < beta, quadratic, d.abs() - 0.5 * beta).sum()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(prediction.grad.double(), (d / beta).clamp(-1, 1), rtol=1e-4, atol=0)


def test_bfloat16_is_summed_in_float32():
    # A bfloat16 running sum stands still at 256 when ones are added.
    ones = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    ours = reconstruction_loss_sum(ones, torch.zeros_like(ones), beta=0.01)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(995.0, rel=1e-6)


def test_no_images_cost_nothing():
    empty = torch.empty(0, 16, 8)
    assert reconstruction_loss_sum(empty, empty, beta=0.01).item() == 0.0
