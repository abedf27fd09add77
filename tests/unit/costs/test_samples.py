"""Predicted operations of samples are those that are counted when the samples are known."""

import numpy as np
import pytest

from megatron_croc.costs.flops import Work, count_flops
from megatron_croc.costs.samples import SampleCost
from megatron_croc.recipes import get_recipe


@pytest.mark.parametrize("mask", ["causal", "visual", "prefix"])
@pytest.mark.parametrize("recipe", ["croc_7b/pretrain_croc", "croc_7b/finetune", "tiny/finetune"])
def test_a_prediction_is_the_count_of_a_sample_whose_text_is_all_labelled(recipe: str, mask: str):
    run = get_recipe(recipe)
    run.model.attention_mask_type = mask  # type: ignore[assignment]
    span = run.model.vision_tower.num_visual_tokens
    tokens, images = np.array([1, 700, 2048, span]), np.array([0, 1, 2, 1])
    predicted = SampleCost.build(run)(tokens, images)
    for number, (length, count) in enumerate(zip(tokens.tolist(), images.tolist(), strict=True)):
        work = Work.from_lengths(
            [length],
            num_labels=max(length - count * span, 0),
            num_images=count,
            span_lengths=() if mask == "causal" else [span] * count,
        )
        counted = sum(count_flops(run, work).values())
        assert predicted[number] == pytest.approx(counted, rel=1e-3)  # four digits are kept


def test_a_cost_is_written_with_all_its_numbers():
    cost = SampleCost(
        per_token=2.0,
        per_pair=0.5,
        per_label=3.0,
        per_image=10.0,
        num_visual_tokens=4,
        has_spans=True,
    )
    # 6 tokens, 4 of them of an image: 12 + (21 + 6) / 2 + 2 * 3 + 10.
    assert cost(np.array([6]), np.array([1])) == [41.5]
    assert str(cost) == "2 a token, 0.5 a pair (bidirectional), 3 a label, 10 an image of 4"
