"""Replacement against scipy on float64 distances, token by token."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from megatron_croc.model.prompt_pool import PromptPool
from megatron_croc.ops.patch_selection import select_replaced
from tests.support.synthetic import tiny_run

NUM_IMAGES = 3


def build(pg_collection, mode):
    """A pool with drawn weights, unit visual embeddings that need a gradient, replaced sets."""
    run = tiny_run(assign_mode=mode)
    pool = PromptPool(run, pg_collection)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pool.weight.normal_(generator=generator)
    num_tokens = run.model.vision_tower.num_visual_tokens
    visual = normalize(torch.randn(NUM_IMAGES, num_tokens, 64, generator=generator), dim=-1)
    replaced = np.stack([select_replaced(num_tokens, 0.75, seed=s) for s in range(NUM_IMAGES)])
    return pool, visual.requires_grad_(), torch.from_numpy(replaced)


def expected_index(pool, visual, replaced, mode):
    """int [n, R] with numpy and scipy."""
    rows = []
    for image, chosen in zip(visual.detach().double().numpy(), replaced.numpy(), strict=True):
        tokens, table = image[chosen], pool.weight.detach().double().numpy()
        cost = np.linalg.norm(tokens[:, None] - table[None], axis=-1)
        rows.append(cost.argmin(axis=1) if mode == "nearest" else linear_sum_assignment(cost)[1])
    return np.stack(rows)


@pytest.mark.parametrize("mode", ["hungarian", "nearest"])
def test_exactly_the_chosen_rows_are_replaced(pg_collection, mode):
    pool, visual, replaced = build(pg_collection, mode)
    out = pool(visual, replaced)
    index = expected_index(pool, visual, replaced, mode)
    assert (out.index.numpy() == index).all()
    for image in range(NUM_IMAGES):
        chosen = replaced[image]
        assert torch.equal(out.embeddings[image][~chosen], visual[image][~chosen])
        assert torch.equal(out.embeddings[image][chosen], pool.weight[index[image]])
        distance = (visual[image][chosen] - pool.weight[index[image]]).norm(dim=-1)
        # float32 distances near 8 through |a|^2 - 2ab + |b|^2.
        torch.testing.assert_close(out.distance[image], distance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["hungarian", "nearest"])
def test_gradients_reach_the_rows_used_and_the_tokens_kept(pg_collection, mode):
    pool, visual, replaced = build(pg_collection, mode)
    out = pool(visual, replaced)
    upstream = torch.randn(out.embeddings.shape, generator=torch.Generator().manual_seed(1))
    (out.embeddings * upstream).sum().backward()
    expected = torch.zeros_like(pool.weight)
    for image, index in enumerate(expected_index(pool, visual, replaced, mode)):
        for row, grad in zip(index, upstream[image][replaced[image]], strict=True):
            expected[row] += grad
    torch.testing.assert_close(pool.weight.grad, expected, rtol=1e-6, atol=1e-6)
    unused = torch.ones(len(expected), dtype=torch.bool)
    unused[out.index.flatten()] = False
    assert unused.any() or mode == "hungarian"
    assert (pool.weight.grad[unused] == 0).all()
    # The match has no gradient: a replaced token gets none at all.
    assert torch.equal(visual.grad, upstream * ~replaced.unsqueeze(-1))


def test_nearest_collapses_where_hungarian_spreads(pg_collection):
    """The reason for the default: with randn rows the shortest row is everyone's nearest."""
    pool, visual, replaced = build(pg_collection, "nearest")
    distinct_nearest = len(pool(visual, replaced).index[0].unique())
    pool.assign_mode = "hungarian"
    assert len(pool(visual, replaced).index[0].unique()) == 12 > distinct_nearest


def test_the_pool_follows_the_dtype_of_the_visual_tokens(pg_collection):
    pool, visual, replaced = build(pg_collection, "hungarian")
    assert pool(visual.bfloat16(), replaced).embeddings.dtype == torch.bfloat16
