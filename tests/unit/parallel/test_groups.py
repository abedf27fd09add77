"""The groups that are made, and no others."""

from megatron.core import parallel_state


def test_no_gloo_groups_are_made_beside_those_of_the_device(pg_collection):
    made = {n: g for n, g in vars(parallel_state).items() if "GLOO" in n and g is not None}
    assert not made
