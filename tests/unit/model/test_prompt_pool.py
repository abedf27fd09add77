"""Replacement against scipy on float64 distances, token by token."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from megatron_croc.model.prompt_pool import PromptPool
from megatron_croc.ops.assignment import assign
from megatron_croc.ops.patch_selection import select_replaced
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run

NUM_IMAGES = 3


def build_pool(run, pg_collection):
    return PromptPool(
        run.model.prompt_pool,
        pg_collection,
        num_visual_tokens=run.model.vision_tower.num_visual_tokens,
        hidden_size=run.model.language_model.hidden_size,
        dtype=torch.float32,
    )


def build(pg_collection, mode):
    """A pool with drawn weights, unit visual embeddings that need a gradient, replaced sets."""
    run = tiny_run(assign_mode=mode)
    pool = build_pool(run, pg_collection)
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
    pool.matcher.assign_mode = "hungarian"
    assert len(pool(visual, replaced).index[0].unique()) == 12 > distinct_nearest


def test_the_pool_follows_the_dtype_of_the_visual_tokens(pg_collection):
    pool, visual, replaced = build(pg_collection, "hungarian")
    assert pool(visual.bfloat16(), replaced).embeddings.dtype == torch.bfloat16


def test_matching_is_timed_and_an_image_kept_to_check_it(pg_collection, monkeypatch):
    pool, visual, replaced = build(pg_collection, "hungarian")
    now = [3.0]

    def solve(*args, **options):
        now[0] += 0.5
        return assign(*args, **options)

    def wait(_):
        now[0] += 0.25

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("megatron_croc.model.matching.time", clock)
    monkeypatch.setattr("megatron_croc.model.matching.assign", solve)
    monkeypatch.setattr("megatron_croc.model.matching.SideWork.wait_on_device", wait)
    pending = pool.start_matching(visual, replaced)
    now[0] = 10.0  # work between the two halves is not counted
    out = pool(visual, replaced, pending)
    assert out.seconds == 0.75 and out.hidden_seconds == 0.0
    assert torch.equal(out.sample.index, out.index[0])
    taken = out.sample.cost.gather(1, out.index[0][:, None]).squeeze(1)
    assert torch.equal(taken, out.distance[0])


@pytest.mark.parametrize("backend", ["cpu", "scipy", "torch"])
def test_every_backend_gives_the_same_replacement(pg_collection, backend):
    pool, visual, replaced = build(pg_collection, "hungarian")
    expected = pool(visual, replaced)
    pool.matcher.assign_backend = backend
    assert torch.equal(pool(visual, replaced).index, expected.index)


def test_begun_early_it_is_the_same_and_a_thread_searches(pg_collection, monkeypatch):
    pool, visual, replaced = build(pg_collection, "hungarian")
    now = pool(visual, replaced)
    started, go = threading.Event(), threading.Event()

    def held_back(*args, **options):
        started.set()
        assert threading.current_thread() is not threading.main_thread()
        assert go.wait(timeout=60)
        time.sleep(0.01)
        return assign(*args, **options)

    monkeypatch.setattr("megatron_croc.model.matching.assign", held_back)
    pending = pool.start_matching(
        visual, replaced, ahead=True
    )  # returns although nothing is solved yet
    assert started.wait(timeout=60)
    go.set()
    pending.matching.result()
    early = pool(visual, replaced, pending)
    assert torch.equal(early.embeddings, now.embeddings)
    assert torch.equal(early.index, now.index) and torch.equal(early.distance, now.distance)
    assert early.hidden_seconds > 0.005


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("assign_mode", ["hungarian", "nearest"])
def test_what_is_not_finite_reaches_the_model_instead_of_ending_one_rank(
    pg_collection, assign_mode, ahead
):
    pool, visual, replaced = build(pg_collection, assign_mode)
    with torch.no_grad():
        pool.weight[3, 3] = float("nan")
    matched = pool(visual, replaced, pool.start_matching(visual, replaced, ahead=ahead))
    assert matched.embeddings.isnan().any()  # the loss will tell all ranks
    with torch.no_grad():
        pool.weight[3, 3] = 0.0
        visual[0, 0, 0] = float("inf")
    matched = pool(visual, replaced, pool.start_matching(visual, replaced, ahead=ahead))
    assert (matched.index >= 0).all()


def match_on_every_rank(sizes: dict, num_images: int, ahead: bool) -> tuple:
    """Index, distance and number of images solved here, of a pool drawn alike on all ranks."""
    from megatron_croc.model import matching
    from megatron_croc.parallel.groups import start_distributed

    run = tiny_run(**sizes)
    pool = build_pool(run, start_distributed(run.parallel, seed=1))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(pool.weight, generator=generator)
    tokens = torch.randn(num_images, pool.num_replaced, 64, generator=generator)
    solved, assign = [], matching.assign

    def watched(cost, **options):
        solved.append(len(cost))
        return assign(cost, **options)

    matching.assign = watched
    matches = pool.matcher.wait(pool.matcher.start(tokens, pool.weight, ahead=ahead))
    return matches.index, matches.distance, solved[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "sizes",
    [
        dict(tensor_model_parallel_size=2),
        dict(context_parallel_size=2),
        dict(tensor_model_parallel_size=2, context_parallel_size=2),
    ],
    ids=["tp2", "cp2", "tp2+cp2"],
)
@pytest.mark.parametrize(("num_images", "ahead"), [(1, False), (5, False), (5, True)])
def test_images_shared_out_over_ranks_match_as_on_one(sizes, num_images, ahead):
    ((index, distance, _),) = run_distributed(match_on_every_rank, 1, {}, num_images, False)
    world_size = 2 ** len(sizes)
    ranks = run_distributed(match_on_every_rank, world_size, sizes, num_images, ahead)
    for other_index, other_distance, _ in ranks:
        assert torch.equal(other_index, index) and torch.equal(other_distance, distance)
    solved = [number for *_, number in ranks]
    assert sum(solved) == num_images and max(solved) - min(solved) <= 1
