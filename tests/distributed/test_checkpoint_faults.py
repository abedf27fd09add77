"""Faults during the writing and reading of checkpoints, injected into real processes."""

import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_croc.checkpoint.manifest import find_damage
from megatron_croc.checkpoint.state import LATEST_FILE, resume_candidates
from tests.support.distributed import context, run_distributed, start_ranks
from tests.support.synthetic import make_step, tiny_run

TP2 = dict(tensor_model_parallel_size=2)
IMAGES = (1, 0, 2, 1)


# Killed at every file operation of a save: a save small enough to be done for each of them.


def save_small(roots: list[str], iteration: int, die_at: int | None) -> int:
    """Save one tensor in each folder; SIGKILL before file operation `die_at`, or their number."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_croc.checkpoint import saving
    from megatron_croc.checkpoint.state import TrainState
    from megatron_croc.parallel.groups import start_distributed

    run = tiny_run(keep_last=1)
    pg = start_distributed(run.parallel, seed=1)
    tensor = torch.full((64, 64), float(iteration))
    saving.checkpoint_content = lambda *_: {  # type: ignore[assignment]
        "model0": {"weight": ShardedTensor.from_rank_offsets("weight", tensor)}
    }
    count = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            if not str(args[0]).startswith(roots[0]):
                return
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    for root in roots:
        run.checkpoint.save = root
        saver = saving.CheckpointSaver(run.checkpoint, [], None, pg, settings="")  # type: ignore[arg-type]
        saver.save(TrainState(iteration=iteration, stage=run.stage))
        saver.close()
    return count


def run_and_die(
    function: Callable[..., Any], world_size: int, *jobs: tuple, at_once: int = 4
) -> list[list[int | None]]:
    """Run function(*job) on its own `world_size` ranks, and wait for them to end however they end.

    From one thread only: a process that several threads wait for loses its exit code.

    Returns:
        The exit codes of each job's ranks.
    """
    codes = []
    for first in range(0, len(jobs), at_once):
        queue = context.Queue()
        started = [
            start_ranks(queue, function, world_size, *job) for job in jobs[first : first + at_once]
        ]
        for ranks in started:
            for process in ranks:
                process.join(120)
                process.kill()
            codes.append([process.exitcode for process in ranks])
    return codes


@pytest.mark.distributed
def test_killed_at_every_file_operation_of_a_save(tmp_path: Path) -> None:
    base = tmp_path / "base"
    run_distributed(save_small, 1, [str(base)], 1, None)
    shutil.copytree(base, tmp_path / "counted")
    (operations,) = run_distributed(save_small, 1, [str(tmp_path / "counted")], 2, None)
    assert operations > 25
    roots = [shutil.copytree(base, tmp_path / f"killed{n:02}") for n in range(operations)]
    codes = run_and_die(save_small, 1, *(([str(root)], 2, n) for n, root in enumerate(roots)))
    assert codes == [[-signal.SIGKILL]] * operations
    latest = [resume_candidates(root)[0] for root in roots]
    assert [find_damage(folder) for folder in latest] == [[]] * operations
    iterations = [folder.name for folder in latest]
    assert iterations == sorted(iterations)  # the old one until the tracker moves, then the new
    assert {*iterations} == {"iter_0000001", "iter_0000002"}
    # The next save clears what was left, and what need not be kept.
    run_distributed(save_small, 1, [*map(str, roots)], 3, None)
    for root in roots:
        assert sorted(os.listdir(root)) == ["iter_0000003", LATEST_FILE]


# A model on two ranks.


def trainer_of(run, pg):
    from megatron_croc.training.build import build_training_state

    return build_training_state(run, pg, train_iters=10)


def step(training) -> None:
    pg, run = training.pg_collection, training.run
    batches = make_step(
        run, training.state.iteration, dp_rank=pg.dp.rank(), dp_size=pg.dp.size(), images=IMAGES
    )
    training.train_step.train(batches, training.optimizer, training.scheduler)
    training.state.iteration += 1
    training.state.consumed_samples += run.training.global_batch_size


def saver_of(training):
    from megatron_croc.checkpoint.saving import CheckpointSaver

    return CheckpointSaver(
        training.run.checkpoint,
        training.chunks,
        training.optimizer,
        training.pg_collection,
        settings="",
    )


def start(root: str, **changes):
    from megatron_croc.parallel.groups import start_distributed

    run = tiny_run("pretrain_croc", save=root, load=root, **TP2, **changes)
    return trainer_of(run, start_distributed(run.parallel, seed=run.training.seed))


def weights_of(training) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in training.chunks for p in chunk.parameters()]


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """Simulate a full disk in one process: a write fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def close(saver) -> str:
    from megatron_croc.errors import CheckpointError

    try:
        saver.close()
    except CheckpointError as error:
        return str(error)
    return ""


def save_on_a_full_disk(root: str) -> list[dict]:
    """Rank 1's disk is full, then rank 0's at the very end; each sync and async."""
    from megatron_croc.checkpoint import saving

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    training = start(root)
    rank = training.pg_collection.tp.rank()
    seen = []
    step(training)
    saver_of(training).save(training.state)
    for is_async in (False, True):
        training.run.checkpoint.async_save = is_async
        saver = saver_of(training)
        step(training)
        with file_limit(20_000) if rank == 1 else file_limit(resource.RLIM_INFINITY):
            saver.save(training.state)
            saver.finish()
        torch.distributed.barrier()
        seen.append({"latest": resume_candidates(root)[0].name, "said": close(saver)})
        real = saving.write_manifest
        saving.write_manifest = no_room  # type: ignore[assignment]
        saver.save(training.state)
        saver.finish()
        saving.write_manifest = real
        torch.distributed.barrier()
        files = sorted(os.listdir(root))
        seen.append({"latest": resume_candidates(root)[0].name, "said": close(saver)})
        step(training)
        saver.save(training.state)  # there is room again
        seen.append({"said": close(saver), "files": files})
        torch.distributed.barrier()
        seen[-1]["latest"] = resume_candidates(root)[0].name
    weights = weights_of(training)
    resumed = trainer_of(training.run, training.pg_collection)
    assert resumed.state == training.state
    assert all(map(torch.equal, weights_of(resumed), weights))
    return seen


@pytest.mark.distributed
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    first, second = run_distributed(save_on_a_full_disk, 2, str(root))
    assert first == second  # both ranks heard of both faults
    for mode, before, failed, after in ((0, 1, 2, 3), (3, 3, 4, 5)):
        share, finish, room = first[mode : mode + 3]
        name = f"{root}/iter_{failed:07d}"
        assert share["said"] == f"{name} could not be saved: rank 1: File too large"
        assert finish["said"] == f"{name} could not be saved: No space left on device"
        assert share["latest"] == finish["latest"] == f"iter_{before:07d}"
        assert not any("incomplete" in file for file in room["files"])
        assert room["said"] == "" and room["latest"] == f"iter_{after:07d}"


def save_and_die(root: str) -> None:
    """Rank 1 is killed by the system in the middle of writing its file."""
    training = start(root)
    step(training)
    saver = saver_of(training)
    saver.save(training.state)
    step(training)
    if training.pg_collection.tp.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    saver.save(training.state)


def resume_all(root: str) -> list[str]:
    """A torn file of one rank: both fall back, or both refuse."""
    from megatron_croc.errors import CheckpointError

    training = start(root)
    assert training.state.iteration == 1
    saver = saver_of(training)  # clears what the killed run left
    torch.distributed.barrier()
    files = sorted(os.listdir(root))
    step(training)
    saver.save(training.state)
    if training.pg_collection.tp.rank() == 0:
        file = Path(root) / "iter_0000002" / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[1000] ^= 4
        file.write_bytes(content)
    torch.distributed.barrier()
    training.run.checkpoint.strict_resume = True
    try:
        trainer_of(training.run, training.pg_collection)
    except CheckpointError as error:
        files.append(str(error))
    training.run.checkpoint.strict_resume = False
    assert trainer_of(training.run, training.pg_collection).state.iteration == 1
    return files


@pytest.mark.distributed
def test_a_rank_killed_while_writing_and_a_flipped_bit(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    (codes,) = run_and_die(save_and_die, 2, (str(root),))
    assert codes[1] == -signal.SIGXFSZ and codes[0] != 0
    staged = root / "iter_0000002.incomplete"
    assert (staged / "__1_0.distcp").stat().st_size == 20_000
    first, second = run_distributed(resume_all, 2, str(root))
    assert first == second
    *files, refusal = first
    assert files == ["iter_0000001", LATEST_FILE]
    assert "iter_0000002 is damaged: __1_0.distcp is not what was written" in refusal
    assert "without --strict-resume" in refusal


def save_in_the_background(root: str) -> list[list[str]]:
    """Two saves of a run, each held back on rank 1 while training goes on."""
    from megatron_croc.checkpoint.writer import Share

    training = start(root + "/async", async_save=True)
    rank = training.pg_collection.tp.rank()
    gate, real = threading.Event(), Share.write

    def write(share: Share) -> None:
        if rank == 1:
            assert gate.wait(60)
        real(share)

    def published() -> list[str]:
        torch.distributed.barrier()
        names = sorted(os.listdir(root + "/async"))
        torch.distributed.barrier()  # no rank goes on and changes what another is looking at
        return names

    Share.write = write  # type: ignore[method-assign]
    saver = saver_of(training)
    seen = []
    step(training)
    saver.save(training.state)
    for _ in range(2):  # training goes on, and rank 0 has long written its part
        step(training)
        saver.poll()
        seen.append(published())
    gate.set()
    for _ in range(50):
        step(training)
        saver.poll()
        if saver._pending is None:
            break
    seen.append(published())
    last = training.state.iteration
    gate.clear()
    saver.save(training.state)
    step(training)
    threading.Timer(0.2, gate.set).start()
    saver.save(training.state)  # waits for the one before it
    seen.append([name for name in published() if not name.endswith("incomplete")])
    saver.close()
    seen.append(published())
    assert seen[3] == ["iter_0000001", f"iter_{last:07d}", LATEST_FILE]
    # The same run, saved in step.
    training.run.checkpoint.save = root + "/sync"
    training.run.checkpoint.async_save = False
    training.run.checkpoint.load = None
    again = trainer_of(training.run, training.pg_collection)
    saver = saver_of(again)
    step(again)
    saver.save(again.state)
    while again.state.iteration < training.state.iteration:
        step(again)
    saver.save(again.state)
    saver.close()
    return seen


@pytest.mark.distributed
def test_saving_in_the_background_is_saving(tmp_path: Path) -> None:
    from megatron_croc.convert.checkpoint_reader import CheckpointReader

    first, second = run_distributed(save_in_the_background, 2, str(tmp_path))
    assert first == second
    held = ["iter_0000001.incomplete"]
    assert first[0] == first[1] == held
    assert first[2] == ["iter_0000001", LATEST_FILE]
    last = (tmp_path / "sync" / LATEST_FILE).read_text()
    assert (tmp_path / "async" / LATEST_FILE).read_text() == last
    for iteration in (1, int(last)):
        folders = [tmp_path / kind / f"iter_{iteration:07d}" for kind in ("sync", "async")]
        sync, background = map(CheckpointReader, folders)
        assert sync.tensors.keys() == background.tensors.keys()
        assert any(key.startswith("optimizer.") for key in sync.tensors)
        for key in sync.tensors:
            assert torch.equal(sync.read(key), background.read(key)), key
        assert find_damage(folders[1]) == []
