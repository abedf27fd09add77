"""Training on the flip gives the losses, gradients and weights of the dense mask in one process.

`prefix` and `visual`, context parallel both ways (all-to-all over heads; gathered keys and values
when one query group does not divide), recomputation of attention and of whole layers.
"""

import pytest

from megatron_croc.ops.attention.flash import EMULATED
from megatron_croc.verification.layouts.compare import BOUNDS, compare, row
from megatron_croc.verification.layouts.observe import RankObservation, assemble, observe
from tests.distributed.test_layouts import STEPS, run_layout
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run

FLIP = {"attention_backend": "flip"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["tp1", "tp2+sp", "pp2"]),
        ({}, ["cp2", "tp2+sp+cp2"]),
        ({"num_query_groups": 1}, ["tp1", "cp2"]),
        ({"attention_mask_type": "prefix"}, ["tp1", "cp2"]),
        ({"attention_mask_type": "prefix", "num_query_groups": 1}, ["cp2"]),
        ({"recompute_granularity": "selective"}, ["tp1", "tp2+sp"]),
        ({"recompute_granularity": "full"}, ["tp1", "cp2"]),
    ],
    ids=[
        "visual",
        "visual-cp",
        "visual-gathered",
        "prefix",
        "prefix-gathered",
        "selective",
        "full",
    ],
)
def test_the_flip_trains_as_the_dense_mask_does(changes: dict, names: list[str]) -> None:
    plain = {k: v for k, v in changes.items() if not k.startswith("recompute")}
    _, alone = run_layout("tp1", "pretrain_croc", {**plain, "attention_backend": "dense"})
    for name in names:
        difference = compare(*run_layout(name, "pretrain_croc", {**changes, **FLIP}), alone)
        assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["pretrain_mlp", "finetune"])
def test_the_other_stages_run_on_it_too(stage: str) -> None:
    changes = {"attention_mask_type": "visual"}
    _, alone = run_layout("tp1", stage, {**changes, "attention_backend": "dense"})
    difference = compare(*run_layout("tp1", stage, {**changes, **FLIP}), alone)
    assert not difference.failures(BOUNDS["fp32"]), row(difference, BOUNDS["fp32"])


def observe_a_skewed_merge() -> RankObservation:
    """One process, in which the flipped call reports a log-sum-exp that is off by 0.01."""
    forward = EMULATED.forward

    def skewed(inputs):
        output = forward(inputs)
        flipped = inputs.call.queries is not None
        return output._replace(lse=output.lse + 0.01) if flipped else output

    EMULATED.forward = skewed
    return observe(tiny_run("pretrain_croc", **FLIP), STEPS)


@pytest.mark.distributed
def test_a_wrong_log_sum_exp_is_seen() -> None:
    _, alone = run_layout("tp1", "pretrain_croc", {"attention_backend": "dense"})
    skewed = assemble(run_distributed(observe_a_skewed_merge, 1))
    assert compare("skewed", skewed, alone).failures(BOUNDS["fp32"])
