"""Visual tokens stand where their placeholders stood, and come back from there."""

import pytest
import torch

from megatron_croc.model.token_merge import (
    merge_visual_tokens,
    take_visual_tokens,
    visual_positions,
)


def test_positions_are_runs_of_n():
    positions = visual_positions(torch.tensor([2, 5, 11]), 3)
    assert positions.tolist() == [[2, 3, 4], [5, 6, 7], [11, 12, 13]]
    assert visual_positions(torch.empty(0, dtype=torch.int64), 3).shape == (0, 3)


def test_merged_row_by_row():
    text = torch.arange(10.0).view(10, 1, 1).repeat(1, 1, 2).requires_grad_()
    visual = (100.0 + torch.arange(4.0)).view(2, 2, 1).repeat(1, 1, 2).requires_grad_()
    positions = visual_positions(torch.tensor([1, 6]), 2)
    merged = merge_visual_tokens(text, visual, positions)
    expected = [0.0, 100.0, 101.0, 3.0, 4.0, 5.0, 102.0, 103.0, 8.0, 9.0]
    assert merged.shape == (10, 1, 2)
    assert merged[:, 0, 0].tolist() == expected and merged[:, 0, 1].tolist() == expected
    assert torch.equal(take_visual_tokens(merged, positions), visual)

    weights = torch.arange(1.0, 11.0).view(10, 1, 1)
    (merged * weights).sum().backward()
    # The embedding of a placeholder (row 0 of the table) must not be trained by it.
    kept = [1.0, 0.0, 0.0, 4.0, 5.0, 6.0, 0.0, 0.0, 9.0, 10.0]
    assert text.grad[:, 0, 0].tolist() == kept
    assert visual.grad[:, :, 0].tolist() == [[2.0, 3.0], [7.0, 8.0]]


def test_the_row_sets_the_dtype():
    text = torch.zeros(4, 1, 2, dtype=torch.bfloat16)
    merged = merge_visual_tokens(text, torch.ones(1, 2, 2), visual_positions(torch.tensor([1]), 2))
    assert merged.dtype == torch.bfloat16 and merged.sum() == 4


def test_no_image_leaves_the_text_alone():
    text = torch.randn(5, 1, 2)
    positions = visual_positions(torch.empty(0, dtype=torch.int64), 3)
    assert torch.equal(merge_visual_tokens(text, torch.empty(0, 3, 2), positions), text)
    assert take_visual_tokens(text, positions).shape == (0, 3, 2)


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_counts_that_do_not_fit_are_refused(num_images):
    positions = visual_positions(torch.tensor([0, 4]), 2)
    with pytest.raises(RuntimeError, match=rf"\({num_images}, 2\).*\(2, 2\)"):
        merge_visual_tokens(torch.zeros(8, 1, 2), torch.zeros(num_images, 2, 2), positions)
