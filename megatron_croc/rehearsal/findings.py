"""Findings of a rehearsal: each class beside the estimate of `croc check`, and every fault."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron_croc.planning.fit import FRAGMENTATION, GIB, Device, gpu_memory, way_out
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.planning.memory import MemoryEstimate, Pack, estimate_memory
from megatron_croc.planning.workload import from_numbers
from megatron_croc.rehearsal.prediction import predict
from megatron_croc.rehearsal.replay.costs import read_costs
from megatron_croc.rehearsal.replay.timeline import Timeline
from megatron_croc.rehearsal.run import Outcome, Rehearsal

PHASES = {"build": "construction", "step": "step", "evaluate": "validation", "save": "saving"}
"""Phases with a peak of their own -> name in the report."""

_GROUPS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "logits": "logits",
    "temporary": "temporary",
    "building": "other",
}


@dataclass(kw_only=True)
class ClassFindings:
    """One class of ranks."""

    rank: int
    name: str
    stage: int
    num_ranks: int
    seconds: float
    cpu_seconds: float
    host_bytes: int
    peaks: dict[str, int]
    """Phase -> bytes."""

    parts: dict[str, int]
    """Bytes by purpose at the peak of the step."""

    peak_place: str
    estimate: MemoryEstimate
    """For packs of the size that was rehearsed."""

    rows: dict[str, Any]
    flops: dict[str, int]
    traffic: list[dict[str, Any]]
    curve: list[int]
    """Bytes over the step, in the order of the work."""

    reads: list[list[Any]]
    waits: list[list[Any]]

    @property
    def highest(self) -> tuple[str, int]:
        """Phase with the highest peak, and its bytes."""
        return max(self.peaks.items(), key=lambda item: item[1])

    @property
    def error(self) -> float | None:
        """Relative difference of the estimate from the rehearsed peak; None without a step."""
        return self.estimate.total / self.peaks["step"] - 1 if "step" in self.peaks else None

    @property
    def error_text(self) -> str:
        """The error in percent, or a dash."""
        return "-" if self.error is None else f"{self.error:+.1%}"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that would stop the job, or a rank, with the way out."""

    ranks: str
    text: str
    way_out: str


@dataclass(kw_only=True)
class Findings:
    """All of a rehearsal."""

    classes: list[ClassFindings] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    device: Device
    timeline: Timeline | None = None
    """The predicted step; None after a fault."""


def gather(rehearsal: Rehearsal) -> Findings:
    """Read the outcomes of all children."""
    device = gpu_memory(get_gpu(rehearsal.gpu))
    findings = Findings(device=device)
    same: dict[tuple[str, str], list[int]] = {}
    for outcome in rehearsal.outcomes:
        result = outcome.result
        if "error" in result:
            same.setdefault((result["error"], _way_out_of(result)), []).append(outcome.of.rank)
            continue
        findings.classes.append(_class(rehearsal, outcome))
        for text, _ in result["faults"]:
            same.setdefault((text, "mend that call"), []).append(outcome.of.rank)
    for (text, advice), ranks in same.items():
        findings.faults.append(Fault(ranks=_names(ranks), text=text, way_out=advice))
    if findings.classes:
        _judge_memory(rehearsal, findings)
    if len(findings.classes) == len(rehearsal.outcomes):
        costs = None if rehearsal.costs is None else read_costs(rehearsal.costs)
        prediction = predict(rehearsal, costs)
        findings.timeline = prediction.timeline
        findings.faults += [
            Fault(ranks="replay", text=text, way_out="") for text in prediction.faults
        ]
    return findings


def _class(rehearsal: Rehearsal, outcome: Outcome) -> ClassFindings:
    result = outcome.result
    stage = outcome.of.place["pp"]
    pack = Pack(**result["pack"])
    peaks = {p: result["peaks"][p]["total"] for p in PHASES if p in result["peaks"]}
    step = result["peaks"]["step" if "step" in result["peaks"] else "evaluate"]
    return ClassFindings(
        rank=outcome.of.rank,
        name=outcome.of.name,
        stage=stage,
        num_ranks=len(outcome.of.stands_for),
        seconds=outcome.seconds,
        cpu_seconds=result["cpu_seconds"],
        host_bytes=result["host_bytes"],
        peaks=peaks,
        parts=step["parts"],
        peak_place=step["place"],
        estimate=estimate_memory(rehearsal.run, rehearsal.world_size, pack)[stage],
        rows=result["rows"],
        flops=result["flops"],
        traffic=result["traffic"],
        curve=result["curve"],
        reads=result["reads"],
        waits=result["waits"],
    )


def _way_out_of(result: dict[str, Any]) -> str:
    error = result["error"]
    if "DeviceMismatch" in error or "different devices" in error:
        return "move the tensor to the device with to_device() before that line"
    if "host memory" in error:
        return "take fewer --jobs"
    return f"it ends the {PHASES.get(result.get('phase', ''), 'start')}; with --out its log stays"


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _judge_memory(rehearsal: Rehearsal, findings: Findings) -> None:
    fullest = max(findings.classes, key=lambda c: c.highest[1])
    phase, peak = fullest.highest
    device = findings.device
    needed = FRAGMENTATION * peak + device.reserved
    if needed > device.memory:
        findings.faults.append(
            Fault(
                ranks=f"rank {fullest.rank}",
                text=f"does not fit on {device.name}: its {PHASES[phase]} peaks at "
                f"{peak / GIB:.1f} GiB, with fragmentation and reserve {needed / GIB:.1f} of "
                f"{device.memory / GIB:.1f} GiB",
                way_out=_smaller_layout(rehearsal, device),
            )
        )


def _smaller_layout(rehearsal: Rehearsal, device: Device) -> str:
    rows = rehearsal.rows
    workload = from_numbers(
        rehearsal.run, text_tokens=rows.text_tokens, images=rows.images, spread=rows.text_spread
    )
    flags = way_out(rehearsal.run, rehearsal.world_size, device, workload)
    if flags is None:
        return "no other layout is expected to fit: take more GPUs, or another --gpu"
    return f"it is expected to fit with {flags}"


def first_of_each_stage(findings: Findings) -> list[ClassFindings]:
    """The first class of each pipeline stage."""
    first: dict[int, ClassFindings] = {}
    for entry in findings.classes:
        first.setdefault(entry.stage, entry)
    return list(first.values())


def grouped(parts: dict[str, int]) -> dict[str, int]:
    """Bytes by the groups of the report: activations by part of the model, the rest as they are."""
    sums: Counter[str] = Counter()
    for purpose, size in parts.items():
        kind, _, part = purpose.partition(", ")
        top = part.partition(".")[0].replace("_", " ")
        sums[f"{kind}: {top}" if part else _GROUPS.get(kind, kind)] += size
    return dict(sums.most_common())
