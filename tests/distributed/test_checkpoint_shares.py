"""Memory and writing of a checkpoint are divided among the data-parallel ranks."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.synthetic import make_step, tiny_run

IMAGES = (1, 0, 2, 1)

pytestmark = pytest.mark.distributed


def start(changes: dict, bucket_size: int | None = None):
    """A training after one step; with `bucket_size`, gradients are reduced in many buckets."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training import build

    if bucket_size is not None:
        config = partial(build.DistributedDataParallelConfig, bucket_size=bucket_size)
        build.DistributedDataParallelConfig = config  # type: ignore[misc,assignment]
        changes = {**changes, "overlap_grad_reduce": True}
    run = tiny_run(**{"projector_lr": 1e-3, **changes})
    pg = start_distributed(run.parallel, seed=run.training.seed)
    training = build.build_training_state(run, pg, train_iters=10)
    training.scheduler.step(increment=16)
    batches = make_step(run, 0, dp_rank=pg.dp.rank(), dp_size=pg.dp.size(), images=IMAGES)
    training.train_step.train(batches, training.optimizer, training.scheduler)
    return training


def pieces_to_write(content: dict) -> dict[tuple, torch.Tensor]:
    """Main replicas of this rank: name and offset -> values."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        apply_factories,
        is_main_replica,
    )

    apply_factories(content)
    return {
        (piece.key, piece.global_offset): piece.data.detach().clone()
        for piece in nested_values(content)
        if isinstance(piece, ShardedTensor) and is_main_replica(piece.replica_id)
    }


def ours_and_megatrons(changes: dict, max_gathered: int) -> dict:
    """State that this rank writes, the state by megatron's code, and the sizes of gathers."""
    import torch.distributed as dist

    from megatron_croc.checkpoint import sharded, shares

    training = start(changes)
    shares.MAX_GATHERED = max_gathered
    gathered: list[int] = []
    real = dist.all_gather_into_tensor

    def watched(output, *args, **kwargs):
        gathered.append(output.numel())
        return real(output, *args, **kwargs)

    dist.all_gather_into_tensor = watched
    pg = training.pg_collection
    ours = sharded.checkpoint_content(training.chunks, training.optimizer, pg)
    dist.all_gather_into_tensor = real
    metadata = {
        **sharded._metadata(pg),
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    theirs = sharded._model_state(training.chunks, metadata)
    flat = {f"{chunk}.{k}": v for chunk, state in theirs.items() for k, v in state.items()}
    theirs["optimizer"] = training.optimizer.sharded_state_dict(flat, metadata=metadata)
    keys = {k: v for k, v in ours["optimizer"].items() if k != "param_state"}
    assert keys == {k: v for k, v in theirs["optimizer"].items() if k != "param_state"}
    return {"ours": pieces_to_write(ours), "theirs": pieces_to_write(theirs), "gathered": gathered}


def num_bytes(pieces: dict[tuple, torch.Tensor]) -> int:
    return sum(piece.numel() * piece.element_size() for piece in pieces.values())


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (4, dict(bf16=True)),
        (4, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        (4, dict(pipeline_model_parallel_size=2)),
        (2, dict(context_parallel_size=2)),
    ],
    ids=["dp2", "dp4 bf16", "tp2 dp2", "pp2 dp2", "cp2"],
)
def test_all_is_written_once_as_megatron_would_and_by_everyone(world_size: int, changes: dict):
    max_gathered = 5000
    results = run_distributed(ours_and_megatrons, world_size, changes, max_gathered)
    ours: dict[tuple, torch.Tensor] = {}
    for result in results:
        assert not ours.keys() & result["ours"].keys()
        ours |= result["ours"]
        assert result["gathered"] and 3 * max(result["gathered"]) <= max_gathered
    theirs = {key: piece for result in results for key, piece in result["theirs"].items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # Shares of copies of one model part are equal but for the size of a parameter.
    shares = [num_bytes(result["ours"]) for result in results]
    assert max(shares) < 1.3 * num_bytes(ours) / world_size, shares


def weights_and_their_copies(changes: dict, bucket_size: int) -> dict:
    """State that this rank writes, and the number of padded buckets before the last."""
    from megatron_croc.checkpoint.sharded import checkpoint_content

    training = start(changes, bucket_size)
    (buffer,) = training.chunks[0].buffers
    padded = sum(b.numel_unpadded < b.grad_data.numel() for b in buffer.buckets[:-1])
    content = checkpoint_content(training.chunks, training.optimizer, training.pg_collection)
    return {"pieces": pieces_to_write(content), "padded": padded}


def test_padded_buckets_shift_nothing():
    """megatron leaves padding out of what it gathers, but not out of parameters' places in it."""
    results = run_distributed(weights_and_their_copies, 2, {}, 1000)
    pieces = {key: piece for result in results for key, piece in result["pieces"].items()}
    assert results[0]["padded"] > 0
    copies = [(name, at) for name, at in pieces if name.startswith("optimizer.state.param.")]
    assert copies
    for name, at in copies:  # in float32 a weight and its copy are equal
        weight = pieces[name.removeprefix("optimizer.state.param."), at]
        assert torch.equal(pieces[name, at], weight), name


def save(changes: dict, folder: str) -> None:
    from tests.support.checkpoints import save_checkpoint

    training = start({**changes, "save": folder})
    state, pg = training.state, training.pg_collection
    save_checkpoint(training.run, state, training.chunks, training.optimizer, pg)


@pytest.mark.parametrize("is_async", [False, True], ids=["in step", "in the background"])
def test_every_rank_writes_a_file_and_the_manifest_names_all(tmp_path: Path, is_async: bool):
    from megatron_croc.checkpoint.manifest import find_damage, read_manifest

    run_distributed(save, 2, dict(async_save=is_async), str(tmp_path))
    folder = tmp_path / "iter_0000000"
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.distcp"))]
    assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(read_manifest(folder)) == names and find_damage(folder) == []


def room_to_load(changes: dict) -> tuple[int, int]:
    """Number of values this rank allocates on a resume, and number in the whole state."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_croc.checkpoint import sharded, shares

    training = start(changes)
    model_state = sharded._model_state(training.chunks, sharded._metadata(training.pg_collection))
    room = shares.state_to_load(training.optimizer, model_state)
    whole = sum(p.numel() for c in training.chunks for p in c.parameters() if p.requires_grad)
    return sum(entry.data.numel() for entry in nested_values(room)), 3 * whole


def test_a_resume_reads_only_what_a_rank_has_a_slice_of():
    results = run_distributed(room_to_load, 4, {})
    assert sum(mine for mine, _ in results) < 2 * results[0][1]  # a parameter on two ranks is twice
    assert all(mine < 0.6 * whole for mine, whole in results)
