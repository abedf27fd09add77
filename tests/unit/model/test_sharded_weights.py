"""The same weights, losses and matches at any layout; each rank's slice worked out by hand."""

import numpy as np
import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.synthetic import make_step, tiny_run

VOCABULARY = 127
"""Not a multiple of 2: at TP 2 the table has a row that belongs to no token."""

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "tp2+sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
}


def look(changes: dict) -> dict:
    """Weights and results of one rank, before and after its weights are set by hand."""
    from megatron_croc.model.norm import Norm
    from megatron_croc.model.sharded_weights import fill_weights, iter_shards
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_model, wrap_model
    from megatron_croc.training.step import TrainStep

    run = tiny_run(freeze_ViT=False, vocab_size=VOCABULARY, **changes)
    pg = start_distributed(run.parallel, seed=1)
    models = build_model(run, pg)
    (model,) = models
    pieces = [
        (s.name, s.shape, s.block, s.data.detach().numpy().copy()) for s in iter_shards(model)
    ]
    train_step = TrainStep(run, wrap_model(run, models, pg), pg)
    indices = []
    if model.prompt_pool is not None:
        model.prompt_pool.register_forward_hook(lambda *args: indices.append(args[-1].index))
    batches = make_step(run, 0, dp_rank=0, dp_size=1, images=(1, 2, 0, 0, 1, 0, 3, 1))
    metrics = train_step.forward_backward(batches).reduce()
    marks = {
        name: [getattr(p, "sequence_parallel", False) for p in module.parameters()]
        for name, module in model.named_modules()
        if isinstance(module, Norm)
    }

    numbered = {}

    def count(shard):
        whole = torch.arange(float(np.prod(shard.shape))).reshape(shard.shape)
        numbered[shard.name] = tuple(shard.shape)
        return whole

    fill_weights(model, count)
    mine = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return {
        "pieces": pieces,
        "losses": (metrics.text_loss, metrics.reconstruction_loss, metrics.matched_distance),
        "indices": [index.numpy() for index in indices],
        "marks": marks,
        "mine": mine,
        "tp_rank": pg.tp.rank(),
        "pp_rank": pg.pp.rank(),
    }


@pytest.fixture(scope="module")
def ranks():
    """layout -> what each of its ranks found."""
    return {name: run_distributed(look, size, changes) for name, (size, changes) in LAYOUTS.items()}


def assemble(results) -> dict[str, np.ndarray]:
    """Whole tensors from all ranks' pieces; pieces that lie twice must agree."""
    wholes: dict[str, np.ndarray] = {}
    for name, shape, block, data in (piece for result in results for piece in result["pieces"]):
        whole = wholes.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
        there = whole[block]
        assert np.isnan(there).all() or (there == data).all(), name
        whole[block] = data
    assert not any(np.isnan(whole).any() for whole in wholes.values())
    return wholes


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "tp2+sp", "pp2"])
def test_fresh_weights_are_the_same_bit_for_bit(ranks, layout):
    alone, cut = assemble(ranks["one"]), assemble(ranks[layout])
    assert alone.keys() == cut.keys()
    for name, whole in alone.items():
        rows = whole.shape[0]  # the padded row of a table is left out
        assert cut[name].shape[0] in (rows, rows + 1)
        assert (cut[name][:rows] == whole).all(), name


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "tp2+sp", "pp2"])
def test_losses_with_a_padded_vocabulary(ranks, layout):
    """A padded row inside the softmax would raise the text loss by log(128 / 127) = 0.008."""
    for result in ranks[layout]:
        # fp32, sums in another order; measured 2e-7.
        assert result["losses"] == pytest.approx(ranks["one"][0]["losses"], rel=1e-5)


@pytest.mark.distributed
def test_every_rank_has_every_match(ranks):
    """Images are matched on one rank each; micro-batches of 3, 0, 1 and 4 images here."""
    (alone,) = ranks["one"]
    assert [len(index) for index in alone["indices"]] == [3, 0, 1, 4]
    for result in ranks["tp2"]:
        for ours, reference in zip(result["indices"], alone["indices"], strict=True):
            assert (ours == reference).all()


@pytest.mark.distributed
def test_norms_are_marked_where_the_sequence_is_cut(ranks):
    for layout in LAYOUTS:
        for result in ranks[layout]:
            assert result["marks"]
            for name, marks in result["marks"].items():
                cut = layout == "tp2+sp" and name.startswith("language_model.")
                assert set(marks) == {cut}, (layout, name)


@pytest.mark.distributed
def test_each_rank_gets_its_own_slice(ranks):
    """Tensors numbered 0, 1, 2, ...: gate and up are halved each, rows or columns as they must."""
    layer = "language_model.decoder.layers.0."
    gate_up = np.arange(192.0 * 64).reshape(192, 64)
    down = np.arange(64.0 * 96).reshape(64, 96)
    qkv = np.arange(128.0 * 64).reshape(128, 64)  # two groups of (2 queries, 1 key, 1 value) x 16
    table = np.arange(128.0 * 64).reshape(128, 64)
    for result in ranks["tp2"]:
        r, mine = result["tp_rank"], result["mine"]
        half = slice(48 * r, 48 * r + 48)
        expected = np.concatenate([gate_up[:96][half], gate_up[96:][half]])
        assert (mine[layer + "mlp.linear_fc1.weight"] == expected).all()
        assert (mine[layer + "mlp.linear_fc2.weight"] == down[:, half]).all()
        rows = slice(64 * r, 64 * r + 64)
        assert (mine[layer + "self_attention.linear_qkv.weight"] == qkv[rows]).all()
        assert (mine["language_model.embedding.word_embeddings.weight"] == table[rows]).all()
        assert (mine["prompt_pool.weight"] == table[:32]).all()
    for result in ranks["pp2"]:
        held = {name.split(".")[0] for name in result["mine"]}
        ends = ({"vision_tower", "projector", "prompt_pool"}, {"reconstruction_head"})
        assert held == ends[result["pp_rank"]] | {"language_model"}


def test_a_tensor_of_another_shape_is_refused(pg_collection):
    from megatron_croc.model.sharded_weights import fill_weights
    from megatron_croc.training.build import build_model

    (model,) = build_model(tiny_run(), pg_collection)
    with pytest.raises(ValueError, match=r": got \(3, 5\), need \("):
        fill_weights(model, lambda shard: torch.zeros(3, 5))
