"""Layouts to try for a number of processes, as changes of a run's settings."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from megatron_croc.config.base import apply_changes
from megatron_croc.config.run import RunConfig
from megatron_croc.config.settings import get_setting

TP = "parallel.tensor_model_parallel_size"
SP = "parallel.sequence_parallel"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
FIRST = "parallel.decoder_first_pipeline_num_layers"
LAST = "parallel.decoder_last_pipeline_num_layers"
CP = "parallel.context_parallel_size"
VISION = "parallel.split_vision"
MICRO_BATCH = "training.micro_batch_size"
RECOMPUTE = "training.recompute_granularity"
METHOD = "training.recompute_method"
RECOMPUTED_LAYERS = "training.recompute_num_layers"
OVERLAP = ("optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather")

Layout = dict[str, Any]
"""Dotted path of a setting -> its value."""

LAYOUT = (TP, SP, PP, VPP, FIRST, LAST, CP, VISION)
LAYOUT += (MICRO_BATCH, RECOMPUTE, METHOD, RECOMPUTED_LAYERS, *OVERLAP)
"""Paths of all settings that the planner chooses."""


def changed(run: RunConfig, changes: Layout) -> RunConfig:
    """Copy of the run with these changes."""
    copied = copy.deepcopy(run)
    apply_changes(copied, changes)
    return copied


def layouts(base: RunConfig, world_size: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every layout to try, with a value for each setting of LAYOUT; not checked for faults."""
    layers = base.model.language_model.num_layers
    powers = [2**n for n in range(world_size.bit_length()) if world_size % 2**n == 0]
    tensor = [n for n in powers if n <= gpus_per_node]
    pipeline = [n for n in powers if n <= min(layers, 16)]
    micro = [n for n in (1, 2, 4, 8, 16, 32) if n <= base.training.global_batch_size]
    for tp, pp, cp, mbs, recompute in itertools.product(
        tensor, pipeline, (1, 2, 4), micro, ("none", "full")
    ):
        if world_size % (tp * pp * cp):
            continue
        overlaps = world_size > tp * pp
        splits = ("heads", "images") if tp * cp > 1 else ("heads",)
        for (vpp, first), split in itertools.product(_pipelines(layers, pp), splits):
            yield {
                TP: tp,
                SP: tp > 1,
                PP: pp,
                VPP: vpp,
                FIRST: first,
                LAST: None,
                CP: cp,
                VISION: split,
                MICRO_BATCH: mbs,
                RECOMPUTE: recompute,
                METHOD: "uniform",
                RECOMPUTED_LAYERS: 1,
                **dict.fromkeys(OVERLAP, overlaps),
            }


def _pipelines(layers: int, pp: int) -> Iterator[tuple[int | None, int | None]]:
    """Chunks per stage, and layers of the first stage where it gets fewer than the others."""
    yield None, None
    if pp == 1:
        return
    for vpp in (2, 4):
        yield vpp, None
    for first in range(max(1, layers // pp - 3), layers // pp):
        yield None, first


_KNOBS = (MICRO_BATCH, SP, RECOMPUTE, TP, CP, PP)
"""Ways to save memory, in the order in which they are tried."""


def memory_savings(run: RunConfig, world_size: int, gpus_per_node: int) -> list[Layout]:
    """Layouts that can only need less memory than the run's own, the smallest changes first.

    A smaller micro-batch, sequence parallelism, recomputation, more tensor, context or pipeline
    parallelism: first each alone in this order, then two of them, and so on. Not checked for
    faults.
    """
    training = run.training
    recomputes_all = training.recompute_granularity == "full" and (
        training.recompute_method == "uniform"
    )
    found: dict[frozenset[tuple[str, Any]], Layout] = {}
    for layout in layouts(run, world_size, gpus_per_node):
        if layout[VPP] is not None or layout[FIRST] is not None:
            continue
        kept = set(LAYOUT) - set(OVERLAP) - {VISION}
        if layout[PP] == run.parallel.pipeline_model_parallel_size:
            kept -= {VPP, FIRST, LAST}
        if layout[RECOMPUTE] == "none" or recomputes_all:  # the run keeps what it recomputes
            kept -= {RECOMPUTE, METHOD, RECOMPUTED_LAYERS}
        changes = {k: v for k, v in layout.items() if k in kept and v != get_setting(run, k)}
        alternatives = [changes]
        if TP not in changes:  # the run may keep its sequences whole
            alternatives.append({k: v for k, v in changes.items() if k != SP})
        for changes in filter(None, alternatives):
            if _only_saves(run, changes):
                found[frozenset(changes.items())] = changes
    return sorted(found.values(), key=lambda changes: _size(run, changes))


def _only_saves(run: RunConfig, changes: Layout) -> bool:
    grown = all(
        changes.get(k, get_setting(run, k)) >= get_setting(run, k) for k in (TP, CP, PP, SP)
    )
    smaller = changes.get(MICRO_BATCH, 0) < run.training.micro_batch_size
    return grown and (smaller or MICRO_BATCH not in changes)


def _size(run: RunConfig, changes: Layout) -> tuple:
    """Number of knobs that are turned, which, and how far."""
    names = {RECOMPUTE if k in (METHOD, RECOMPUTED_LAYERS) else k for k in changes}
    turned = [k for k in _KNOBS if k in names and not (k == SP and TP in changes)]
    after = [changes.get(k, get_setting(run, k)) for k in (TP, CP, PP)]
    micro = changes.get(MICRO_BATCH, run.training.micro_batch_size)
    return len(turned), [_KNOBS.index(k) for k in turned], *after, -micro
