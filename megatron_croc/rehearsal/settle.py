"""The planner's best layouts, each rehearsed and replayed, in the order of their replayed steps.

A layout is rehearsed with equal micro-batches of mean samples, only as many as its steady state
needs (unrolled.py), and ends after the training step. The replay then gives every replica the
samples that it would draw, so that replicas wait for each other as in a run.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.planning.gpus import Gpu
from megatron_croc.planning.search import Candidate
from megatron_croc.planning.workload import Workload
from megatron_croc.rehearsal.cache import TimeCache
from megatron_croc.rehearsal.findings import gather
from megatron_croc.rehearsal.job import Rows, settings_of
from megatron_croc.rehearsal.replay.timeline import Timeline
from megatron_croc.rehearsal.run import MAX_WORLD, Rehearsal, perform_all
from megatron_croc.rehearsal.sizes import Loads, drawn_loads, load_of_samples, step_sizes
from megatron_croc.rehearsal.unrolled import NoSteadyStateError, micro_batches_to_record
from megatron_croc.rehearsal.versions import require_rehearsable


@dataclass(frozen=True, kw_only=True)
class Settled:
    """One layout after its replay."""

    candidate: Candidate
    seconds: float | None = None
    """Time of a step; None: it has none, for `reason`."""

    parts: dict[str, float] = field(default_factory=dict)
    """compute, bubble, traffic, waits, host: mean seconds of a rank."""

    source: str = ""
    """The origin of the costs."""

    reason: str = ""
    """Fault that the replay has found, or why there was no replay."""

    is_faulty: bool = False


def settle(
    candidates: Sequence[Candidate],
    world_size: int,
    gpu: Gpu,
    workload: Workload,
    *,
    costs: Path | None,
    at_once: int,
    time_limit: float,
    tell: Callable[[str], None],
) -> list[Settled]:
    """Rehearse layouts and replay a step of each; results are kept in the cache.

    Args:
        candidates: layouts, the likeliest first.
        world_size: number of GPUs.
        gpu: their kind.
        workload: distribution of sample lengths.
        costs: table of measured costs; None: peak x efficiency.
        at_once: processes that run at once.
        time_limit: seconds for all rehearsals.
        tell: takes a line of progress.

    Returns:
        the fastest first; then those without a time, faulty ones last.

    Raises:
        ConfigError: a setting that cannot be rehearsed, or an unknown version.
        RunError: no C++ compiler, or the processes could not start.
    """
    if world_size > MAX_WORLD:
        raise ConfigError(f"--replay takes up to {MAX_WORLD:,} GPUs, not {world_size:,}")
    require_rehearsable(candidates[0].run.training)
    cache, known = TimeCache(), dict[int, Settled]()
    table = None if costs is None else costs.read_text()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        waiting: dict[int, tuple[int, list[Any]]] = {}  # by the identity of the rehearsal
        rehearsals = []
        for number, candidate in enumerate(candidates):
            about = [settings_of(candidate.run), world_size, gpu.name, asdict(workload), table]
            if (found := cache.read(about)) is not None:
                known[number] = Settled(candidate=candidate, **found)
                continue
            folder = Path(name) / str(number)
            folder.mkdir()
            rehearsal = _rehearsal(candidate, world_size, gpu, workload, folder)
            rehearsals.append(replace(rehearsal, costs=costs))
            waiting[id(rehearsals[-1])] = number, about
        if known:
            tell(f"{len(known)} of {len(candidates)} layouts were replayed before")

        def keep(rehearsal: Rehearsal) -> None:
            number, about = waiting[id(rehearsal)]
            known[number] = settled = _replayed(candidates[number], rehearsal)
            if settled.seconds is not None or settled.is_faulty:
                kept = {key: value for key, value in vars(settled).items() if key != "candidate"}
                cache.write(about, kept)

        if rehearsals:
            perform_all(rehearsals, at_once=at_once, time_limit=time_limit, tell=tell, on_done=keep)
    late = f"not done after {time_limit / 60:g} minutes; what was done is kept, run it again"
    ordered = [
        known.get(number) or Settled(candidate=candidate, reason=late)
        for number, candidate in enumerate(candidates)
    ]
    return sorted(ordered, key=lambda s: (s.is_faulty, s.seconds is None, s.seconds or 0.0))


def _rehearsal(
    candidate: Candidate, world_size: int, gpu: Gpu, workload: Workload, folder: Path
) -> Rehearsal:
    """The rehearsal of a layout: few equal micro-batches, and the loads of all of a real step."""
    run = candidate.run
    replicas = run.parallel.data_parallel_size(world_size)
    wanted = run.num_microbatches(world_size)
    recorded = micro_batches_to_record(run.parallel, wanted)
    size = recorded * run.training.micro_batch_size * replicas
    training = replace(run.training, global_batch_size=size, transformer_impl="local")
    data = replace(run.data, balance_replicas=None)  # all are equal
    small = replace(run, training=training, data=data)
    text = workload.mean - workload.images * run.model.vision_tower.num_visual_tokens
    return Rehearsal(
        run=small,
        world_size=world_size,
        gpu=gpu.name,
        rows=Rows(kind="mean", text_tokens=max(text, 0.0), text_spread=0.0, images=workload.images),
        folder=folder,
        step_only=True,
        micro_batches=wanted,
        loads=relative_loads(run, workload, replicas),
        title=f"{candidate.name}, ",
    )


def relative_loads(run: RunConfig, workload: Workload, replicas: int) -> Loads:
    """Work of the micro-batches that replicas draw, relative to micro-batches of mean samples."""
    (mean, *_) = step_sizes(run, "mean", workload, dp_rank=0, dp_size=replicas)
    base = load_of_samples(mean)
    return [
        [{part: work / base[part] for part, work in load.items() if base[part]} for load in its]
        for its in drawn_loads(run, workload, replicas)
    ]


def _replayed(candidate: Candidate, rehearsal: Rehearsal) -> Settled:
    try:
        findings = gather(rehearsal)
    except NoSteadyStateError as error:
        return Settled(candidate=candidate, reason=str(error))
    if findings.faults:
        return Settled(candidate=candidate, reason=findings.faults[0].text, is_faulty=True)
    assert findings.timeline is not None
    return Settled(
        candidate=candidate,
        seconds=findings.timeline.seconds,
        parts=parts_of(findings.timeline),
        source=findings.timeline.source,
    )


def parts_of(timeline: Timeline) -> dict[str, Any]:
    """Mean seconds of a rank by cause, groups taken together; they add up to the step."""
    return {
        "compute": timeline.compute,
        "bubble": timeline.bubble,
        "traffic": sum(timeline.exposed.values()),
        "waits": sum(timeline.waits.values()),
        "host": timeline.host,
    }
