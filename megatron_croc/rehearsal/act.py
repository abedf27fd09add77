"""The life of one rank on the fake device: start, build, a step, validation, saving.

All of it is the code that trains; only where data would be read or written is it cut short.
"""

import gc
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from megatron_croc.checkpoint.sharded import checkpoint_content
from megatron_croc.config.run import RunConfig
from megatron_croc.model.parameters import PARTS, padded_vocab_size
from megatron_croc.parallel import broadcast
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.rehearsal import kernels, marks
from megatron_croc.rehearsal.fake_groups import record_object, start_world
from megatron_croc.rehearsal.job import Job
from megatron_croc.rehearsal.ledger import Ledger, Peak
from megatron_croc.rehearsal.loads import replica_loads
from megatron_croc.rehearsal.recorder import Recorder
from megatron_croc.rehearsal.rows import Replay, describe_rows, largest_pack, make_rows
from megatron_croc.rehearsal.trace import AXES, LATER_STEP, STEP_PHASES, Header, Mark, Memory
from megatron_croc.rehearsal.versions import installed_versions
from megatron_croc.training import batch_broadcast
from megatron_croc.training.batch_broadcast import BatchBroadcaster
from megatron_croc.training.build import TrainingState, build_model, build_training_state
from megatron_croc.training.step import TrainStep

MOST_POINTS = 600
"""Points of the curve of memory over the step."""

_GROUPS = ("tp", "pp", "cp", "dp", "dp_cp", "mp", "embd", "pos_embd")
"""Names of megatron's groups, the first that fits a group wins."""


def rehearse(job: Job, recorder: Recorder, *, trace: Path) -> dict[str, Any]:
    """Take one rank through all phases.

    Args:
        job: rank, world and run.
        recorder: gets what the rank asks for.
        trace: file for the trace.

    Returns:
        the rank's part of the report, JSON's types only.
    """
    run, began = _from_the_start(job.run()), time.monotonic()
    kernels.replace_fused_swiglu()
    kernels.replace_flex(recorder)
    start_world(recorder, rank=job.rank, world_size=job.world_size)
    ledger = Ledger(recorder)
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        print(f"phase {name}", flush=True)  # the parent's progress
        started = time.monotonic()
        ledger.start_phase(name)
        yield
        gc.collect()
        seconds[name] = time.monotonic() - started

    with ExitStack() as stack:
        stack.enter_context(recorder.mode)
        stack.enter_context(ledger)
        with phase("groups"):
            pg = start_distributed(run.parallel, seed=run.training.seed)
            _name_groups(recorder, pg)
        with phase("rows"):
            rows = make_rows(run, job.rows, dp_rank=pg.dp.rank(), dp_size=pg.dp.size())
        with phase("build"):
            recorder.mode.host_is_real = False  # weights are drawn on the CPU
            training = None
            if recorder.forward_only is None:
                training = build_training_state(run, pg, train_iters=1000)
            step = training.train_step if training else TrainStep(run, [*build_model(run, pg)], pg)
            recorder.mode.host_is_real = True
        _name_storages(ledger, step.chunks, training)
        _follow(ledger, run, step)
        marks.install(recorder, step, num_microbatches=len(rows))
        after_build = ledger.held_by_purpose()
        with phase("step" if training else "evaluate"):
            batches = _share(recorder, run, pg, rows)
            if training:
                step.train(batches, training.optimizer, training.scheduler)
        if training and run.optimizer.overlap_grad_reduce:
            with phase(LATER_STEP):
                step.train(batches, training.optimizer, training.scheduler)
        if not job.step_only:
            with phase("evaluate"):
                step.evaluate(batches)
        if training and not job.step_only:
            with phase("save"):
                _save(training)
        ledger.end()
    sizes = {axis: getattr(pg, axis).size() for axis in AXES}
    header = Header(
        rank=job.rank,
        world_size=job.world_size,
        sizes=sizes,
        vpp=len(step.chunks),
        stands_for=tuple(job.stands_for),
        versions=installed_versions(),
    )
    recorder.write(trace, header)
    return {
        "rank": job.rank,
        "forward_only": recorder.forward_only,
        "place": {axis: getattr(pg, axis).rank() for axis in AXES},
        "sizes": sizes,
        "seconds": {**seconds, "all": time.monotonic() - began},
        "cpu_seconds": time.process_time(),  # since the fork
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rows": describe_rows(rows),
        "loads": replica_loads(run, job.rows, dp_size=sizes["dp"]) if job.rank == 0 else None,
        "pack": asdict(largest_pack(rows)),
        "after_build": after_build,
        "peaks": {name: asdict(peak) for name, peak in _peaks(ledger).items()},
        "curve": _curve(recorder),
        "flops": dict(recorder.flops.most_common()),
        "kernels": dict(recorder.kernels.most_common()),
        "traffic": [
            {"phase": p, "collective": c, "group": g, "size": s, **asdict(traffic)}
            for (p, c, g, s), traffic in recorder.traffic.items()
        ],
        "reads": [[*key, n] for key, n in recorder.reads.most_common()],
        "waits": [[*key, n] for key, n in recorder.waits.most_common()],
        "faults": recorder.faults.most_common(),
    }


def _peaks(ledger: Ledger) -> dict[str, Peak]:
    """The peak of each phase; the step's is that of its fuller one."""
    peaks = dict(ledger.peaks)
    later = peaks.pop(LATER_STEP, None)
    if later is not None and later.total > peaks["step"].total:
        peaks["step"] = later
    return peaks


def _curve(recorder: Recorder) -> list[int]:
    """Bytes over the training step, its peaks kept, in at most MOST_POINTS numbers."""
    phases: list[str] = []
    sizes: list[int] = []
    for event in recorder.events:
        if isinstance(event, Mark):
            if event.phase == LATER_STEP:
                break
            phases.append(event.phase)
        elif isinstance(event, Memory) and phases and phases[-1] in STEP_PHASES:
            sizes.append(event.peak)
    stretch = -(-len(sizes) // MOST_POINTS) or 1
    return [max(sizes[n : n + stretch]) for n in range(0, len(sizes), stretch)]


def _name_groups(recorder: Recorder, pg: ProcessGroupCollection) -> None:
    """Name every group of this rank: as we call it, or as megatron describes it."""
    names = recorder.group_names
    names[distributed_c10d._get_default_group().group_name] = "world"
    for name in _GROUPS:
        group = getattr(pg, name, None)
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, name)
    for group in distributed_c10d._world.pg_map:
        described = group.group_desc.removesuffix("_GROUP").lower()
        names.setdefault(group.group_name, described)
        recorder.groups[group.group_name] = tuple(dist.get_process_group_ranks(group))


def _from_the_start(run: RunConfig) -> RunConfig:
    """The run without the checkpoints that it would read and write."""
    unread = replace(run.checkpoint, load=None, save=None, pretrained_checkpoint=None)
    return replace(run, checkpoint=unread)


def _name_storages(ledger: Ledger, chunks: list[nn.Module], training: TrainingState | None) -> None:
    """Weights, gradients and optimizer state, by what holds them."""
    for chunk in chunks:
        ledger.name_storages("weights", [*chunk.parameters(), *nn.Module.buffers(chunk)])
    if training is None:
        return
    for chunk in chunks:
        buffers: Any = [*chunk.buffers, *chunk.expert_parallel_buffers]  # type: ignore[misc]
        for buffer in buffers:
            ledger.name_storages("gradients", [buffer.grad_data])
            if buffer.param_data is not None:
                ledger.name_storages("weights", [buffer.param_data])
    for part in training.optimizer.chained_optimizers:  # type: ignore[attr-defined]
        inner = part.optimizer
        if inner is None:
            continue
        state = [t for s in inner.state.values() for t in s.values() if isinstance(t, Tensor)]
        own = {id(p) for chunk in chunks for p in chunk.parameters()}
        main = [p for group in inner.param_groups for p in group["params"] if id(p) not in own]
        ledger.name_storages("optimizer", [*main, *state])


def _follow(ledger: Ledger, run: RunConfig, step: TrainStep) -> None:
    tp = run.parallel.tensor_model_parallel_size
    columns = padded_vocab_size(run.model.language_model.vocab_size, tp) // tp
    for model in step.models:
        ledger.follow(model, PARTS, logit_columns=columns)


def _share(recorder: Recorder, run: RunConfig, pg: ProcessGroupCollection, rows: Any) -> Any:
    """The batches of a step as the replica's ranks share them; every rank has made its own."""

    def broadcast_object(value: Any, group: dist.ProcessGroup) -> Any:
        if group.size() > 1:
            root = dist.get_process_group_ranks(group)[0]
            record_object(recorder, "broadcast", value, group, root)
        return value

    batch_broadcast.broadcast_object = broadcast_object  # type: ignore[assignment]
    assert broadcast.broadcast_tensor is batch_broadcast.broadcast_tensor
    broadcaster = BatchBroadcaster(
        Replay(rows),  # type: ignore[arg-type]
        pg,
        num_microbatches=len(rows),
        img_size=run.model.vision_tower.img_size,
    )
    return broadcaster.next_step()


def _save(training: TrainingState) -> None:
    """Do the device's side of saving: gather the optimizer's state, and copy it to the host."""
    checkpoint_content(training.chunks, training.optimizer, training.pg_collection)
