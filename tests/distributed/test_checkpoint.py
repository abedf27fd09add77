"""A resumed run equals an uninterrupted run, at the same and at another layout."""

from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.synthetic import make_step, tiny_run

IMAGES = (1, 0, 2, 1)


def train_from(changes: dict, first: int, last: int, save: str | None, load: str | None) -> dict:
    """Train steps first..last; losses, and a digest of this rank's weights and moments."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_training_state
    from tests.support.checkpoints import save_checkpoint

    run = tiny_run("pretrain_croc", save=save, load=load, projector_lr=1e-3, **changes)
    pg = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, pg, train_iters=10)
    assert training.state.iteration == first
    rows, rates = [], None
    for step in range(first, last):
        batches = make_step(run, step, dp_rank=pg.dp.rank(), dp_size=pg.dp.size(), images=IMAGES)
        metrics = training.train_step.train(batches, training.optimizer, training.scheduler)
        training.state.iteration += 1
        training.state.consumed_samples += run.training.global_batch_size
        rows.append((metrics.text_loss, metrics.reconstruction_loss, metrics.grad_norm))
        rates = metrics.learning_rates
    if save is not None:
        save_checkpoint(run, training.state, training.chunks, training.optimizer, pg)
    weights = [p.detach().clone() for chunk in training.chunks for p in chunk.parameters()]
    moments = [
        state[name].clone()
        for state in training.optimizer.chained_optimizers[0].optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq", "step")
    ]
    return {"rows": rows, "weights": weights, "moments": moments, "rates": rates}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        (2, dict(pipeline_model_parallel_size=2)),
        (2, {}),
    ],
    ids=["one", "tp2+sp", "pp2", "dp2"],
)
def test_resume_is_bit_for_bit(tmp_path: Path, world_size: int, changes: dict) -> None:
    save = str(tmp_path / "checkpoints")
    unbroken = run_distributed(train_from, world_size, changes, 0, 6, None, None)
    run_distributed(train_from, world_size, changes, 0, 3, save, None)
    resumed = run_distributed(train_from, world_size, changes, 3, 6, None, save)
    for whole, part in zip(unbroken, resumed, strict=True):
        assert whole["rows"][3:] == part["rows"]
        assert whole["rates"] == part["rates"]
        for kind in ("weights", "moments"):
            for a, b in zip(whole[kind], part[kind], strict=True):
                assert torch.equal(a, b)


@pytest.mark.distributed
def test_a_save_waits_for_weights_still_to_be_gathered(tmp_path: Path) -> None:
    """With overlap_param_gather a step ends before other replicas' updates have arrived."""
    from megatron_croc.convert.checkpoint_reader import CheckpointReader

    overlap = dict(overlap_grad_reduce=True, overlap_param_gather=True)
    saved = {}
    for name, world_size, changes in (("one", 1, {}), ("dp2", 2, {}), ("overlap", 2, overlap)):
        save = tmp_path / name
        run_distributed(train_from, world_size, changes, 0, 3, str(save), None)
        reader = CheckpointReader(save / "iter_0000003")
        saved[name] = {key: reader.read(key) for key in reader.tensors}
    assert len(saved["one"]) > 40
    for key, alone in saved["one"].items():
        assert torch.equal(saved["overlap"][key], saved["dp2"][key]), key
        # Three steps of rates up to 2e-3; only the order of sums differs.
        torch.testing.assert_close(saved["overlap"][key], alone, rtol=0, atol=1e-4, msg=key)
    # The run itself goes on from it as if it had never stopped.
    unbroken = run_distributed(train_from, 2, overlap, 0, 5, None, None)
    resumed = run_distributed(train_from, 2, overlap, 3, 5, None, str(tmp_path / "overlap"))
    for whole, part in zip(unbroken, resumed, strict=True):
        assert whole["rows"][3:] == part["rows"]


LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("saved_at", "resumed_at"),
    [
        ("tp2", ["one", "dp2", "pp2"]),
        ("dp2", ["one", "tp2"]),
        ("pp2", ["tp2"]),
        ("one", ["dp2"]),
    ],
)
def test_resume_at_another_layout(tmp_path: Path, saved_at: str, resumed_at: list[str]) -> None:
    """Weights, moments and step counts: the losses that follow are those of the unbroken run."""
    save = str(tmp_path / "checkpoints")
    (unbroken,) = run_distributed(train_from, 1, {}, 0, 6, None, None)
    world_size, changes = LAYOUTS[saved_at]
    run_distributed(train_from, world_size, changes, 0, 3, save, None)
    for layout in resumed_at:
        world_size, changes = LAYOUTS[layout]
        for part in run_distributed(train_from, world_size, changes, 3, 6, None, save):
            for ours, reference in zip(part["rows"], unbroken["rows"][3:], strict=True):
                assert ours == pytest.approx(reference, rel=2e-5), layout


def start_stage(stage: str, changes: dict, pretrained: str, save: str | None) -> dict:
    """Start a stage from another stage's checkpoint; return whole tensors by name (one process)."""
    from megatron_croc.model.sharded_weights import iter_shards
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_training_state
    from tests.support.checkpoints import save_checkpoint

    run = tiny_run(stage, pretrained_checkpoint=pretrained or None, save=save, **changes)
    pg = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, pg, train_iters=10)
    if save is not None:
        with torch.no_grad():
            for parameter in training.chunks[0].parameters():
                parameter += 0.25
        save_checkpoint(run, training.state, training.chunks, training.optimizer, pg)
    # What the optimizer will step from must be the loaded weights, not the fresh ones.
    batches = make_step(run, 0, dp_rank=0, dp_size=1, images=IMAGES)
    start = {s.name: s.data.detach().clone() for s in iter_shards(training.chunks[0].module)}
    training.scheduler.step(increment=8)
    training.train_step.train(batches, training.optimizer, training.scheduler)
    moved = {
        s.name: (s.data.detach() - start[s.name]).abs().max().item()
        for s in iter_shards(training.chunks[0].module)
    }
    return {"start": start, "moved": moved}


@pytest.mark.distributed
def test_a_stage_starts_from_the_weights_of_the_one_before(tmp_path: Path) -> None:
    save = str(tmp_path / "mlp")
    (before,) = run_distributed(start_stage, 1, "pretrain_mlp", {}, "", save)
    (after,) = run_distributed(start_stage, 1, "pretrain_croc", {}, save, None)
    for name, tensor in before["start"].items():
        assert torch.equal(after["start"][name], tensor), name
    fresh = {n for n in after["start"] if n not in before["start"]}
    assert {n.split(".")[0] for n in fresh} == {"prompt_pool", "reconstruction_head"}
    # One Adam step moves a weight by about the learning rate (5e-4 .. 2e-3 in warm-up), not 0.25.
    trained = {n: m for n, m in after["moved"].items() if not n.startswith("vision_tower")}
    assert max(trained.values()) < 0.01
    assert all(m == 0.0 for n, m in after["moved"].items() if n.startswith("vision_tower"))


@pytest.mark.distributed
def test_another_architecture_is_refused_by_key_and_shape(tmp_path: Path) -> None:
    save = str(tmp_path / "mlp")
    run_distributed(start_stage, 1, "pretrain_mlp", {}, "", save)
    refusal = (
        r"CheckpointError: .*iter_0000000 holds another architecture than this run's model:\n"
        r"  language_model\S*linear_fc1\.weight: \(4, 192, 64\) there, \(4, 256, 64\) needed\n"
    )
    with pytest.raises(AssertionError, match=refusal):
        run_distributed(start_stage, 1, "pretrain_croc", {"ffn_hidden_size": 128}, save, None)
