"""Number of replaced tokens; the draw is a function of its arguments alone."""

import random

import numpy as np
import pytest
import torch

from megatron_croc.ops.patch_selection import image_seed, num_kept, select_replaced

BASE = {"seed": 1, "epoch": 0, "sample_id": "a/1", "image_index": 0}
RECORDED_SEED = 2347307270339244461


@pytest.mark.parametrize(("num_tokens", "num_replaced"), [(576, 432), (729, 547), (16, 12)])
def test_counts_of_the_papers(num_tokens, num_replaced):
    for seed in range(20):
        replaced = select_replaced(num_tokens, 0.75, seed=seed)
        assert replaced.dtype == bool and replaced.shape == (num_tokens,)
        assert replaced.sum() == num_replaced


def test_as_many_stay_as_in_the_released_code():
    # torch.randperm(N)[N // 4:] is replaced there.
    assert all(num_kept(n, 0.75) == n // 4 for n in range(1, 1000))
    # 1 - 0.9 is a little less than 0.1 in binary: 1 of 10 must stay all the same.
    assert num_kept(10, 0.9) == 1


def test_the_seed_depends_on_every_argument():
    changes = [{"seed": 2}, {"epoch": 1}, {"sample_id": "a/2"}, {"image_index": 1}]
    seeds = [image_seed(**{**BASE, **change}) for change in [{}, *changes]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = {select_replaced(64, 0.75, seed=seed).tobytes() for seed in seeds}
    assert len(draws) == len(seeds)


def test_neighbouring_arguments_do_not_run_into_each_other():
    # "1" + "1" and "11" + "" would be the same without a separator.
    one = image_seed(seed=1, epoch=11, sample_id="x", image_index=0)
    other = image_seed(seed=11, epoch=1, sample_id="x", image_index=0)
    assert one != other


def test_another_process_draws_the_same():
    # A value recorded in another process: Python's own hash() would differ in each.
    assert image_seed(**BASE) == RECORDED_SEED
    assert np.flatnonzero(~select_replaced(16, 0.75, seed=1)).tolist() == [0, 1, 10, 14]


def test_global_generators_are_neither_read_nor_moved():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = select_replaced(576, 0.75, seed=image_seed(**BASE))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert (select_replaced(576, 0.75, seed=image_seed(**BASE)) == first).all()


def test_every_token_is_replaced_equally_often():
    num_draws = 4000
    share = np.mean([select_replaced(16, 0.75, seed=s) for s in range(num_draws)], axis=0)
    # Five standard deviations of a binomial share.
    assert np.abs(share - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / num_draws)
