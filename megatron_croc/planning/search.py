"""Every layout the configuration checks accept, with its memory and its time."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_croc.config.checks import find_faults
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.planning.gpus import Gpu
from megatron_croc.planning.memory import MemoryEstimate, estimate_memory
from megatron_croc.planning.step_time import StepTime, estimate_step
from megatron_croc.planning.workload import Workload

RESERVED = 4e9
"""Bytes of a GPU kept for CUDA, NCCL and the kernels' workspaces (an assumption)."""

FRAGMENTATION = 1.1
"""Ratio of the memory that the allocator reserves to that of the tensors (assumption)."""


INDISTINGUISHABLE = 0.05
"""Relative difference of two times below which the estimate cannot rank them."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout."""

    run: RunConfig
    memory: list[MemoryEstimate]
    time: StepTime
    free: float
    """Bytes left on the fullest GPU; negative: it does not fit."""

    @property
    def name(self) -> str:
        """tp2+sp pp4 vpp2 mbs1 recompute."""
        parallel, training = self.run.parallel, self.run.training
        words = [f"tp{parallel.tensor_model_parallel_size}"]
        if parallel.sequence_parallel:
            words[0] += "+sp"
        if parallel.pipeline_model_parallel_size > 1:
            words.append(f"pp{parallel.pipeline_model_parallel_size}")
        if parallel.virtual_pipeline_model_parallel_size:
            words.append(f"vpp{parallel.virtual_pipeline_model_parallel_size}")
        if parallel.decoder_first_pipeline_num_layers:
            words.append(f"first{parallel.decoder_first_pipeline_num_layers}")
        if parallel.context_parallel_size > 1:
            words.append(f"cp{parallel.context_parallel_size}")
        words.append(f"mbs{training.micro_batch_size}")
        if training.recompute_granularity == "full":
            words.append("recompute")
        return " ".join(words)

    @property
    def flags(self) -> str:
        """Command-line flags of this layout, to be added to the recipe."""
        parallel, training = self.run.parallel, self.run.training
        words = [f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}"]
        no = "" if parallel.sequence_parallel else "no-"
        words.append(f"--{no}sequence-parallel")
        words.append(f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}")
        for name in ("virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers"):
            if (value := getattr(parallel, name)) is not None:
                words.append(f"--{name.replace('_', '-')} {value}")
        words.append(f"--context-parallel-size {parallel.context_parallel_size}")
        words.append(f"--micro-batch-size {training.micro_batch_size}")
        words.append(f"--recompute-granularity {training.recompute_granularity}")
        if training.recompute_granularity == "full":
            words.append("--recompute-method uniform --recompute-num-layers 1")
        if self.run.optimizer.overlap_grad_reduce:
            words.append("--overlap-grad-reduce --overlap-param-gather")
        return " ".join(words)


def assess(run: RunConfig, world_size: int, gpu: Gpu, workload: Workload) -> Candidate:
    """Memory and time of one layout that the checks accept."""
    memory = estimate_memory(run, world_size, workload.pack(run))
    worst = max(stage.total for stage in memory)
    return Candidate(
        run=run,
        memory=memory,
        time=estimate_step(run, world_size, gpu, workload),
        free=gpu.memory - RESERVED - FRAGMENTATION * worst,
    )


def search(base: RunConfig, world_size: int, gpu: Gpu, workload: Workload) -> list[Candidate]:
    """Every accepted layout: those that fit first, of them the fastest (near ties: fewest cuts).

    Raises:
        ConfigError: no layout of this recipe is possible at this world size.
    """
    found = [
        assess(run, world_size, gpu, workload)
        for run in _layouts(base, world_size, gpu)
        if not find_faults(run, world_size)
    ]
    if not found:
        raise ConfigError(
            f"--gpus {world_size}: no layout of this recipe divides over them; choose a multiple "
            f"of a power of two, or another --global-batch-size than "
            f"{base.training.global_batch_size}"
        )
    fastest = min((c.time.total for c in found if c.free >= 0), default=0.0)

    def order(candidate: Candidate) -> tuple:
        parallel, seconds = candidate.run.parallel, candidate.time.total
        # Of layouts the model cannot tell apart the simplest, with the fewest cuts, goes first.
        is_tied = seconds <= fastest * (1 + INDISTINGUISHABLE)
        cuts = parallel.model_parallel_size + (parallel.virtual_pipeline_model_parallel_size or 1)
        return candidate.free < 0, not is_tied, cuts if is_tied else 0, seconds

    return sorted(found, key=order)


def _layouts(base: RunConfig, world_size: int, gpu: Gpu) -> Iterator[RunConfig]:
    layers = base.model.language_model.num_layers
    powers = [2**n for n in range(world_size.bit_length()) if world_size % 2**n == 0]
    tensor = [n for n in powers if n <= gpu.gpus_per_node]
    pipeline = [n for n in powers if n <= min(layers, 16)]
    micro = [n for n in (1, 2, 4, 8, 16, 32) if n <= base.training.global_batch_size]
    for tp, pp, cp, mbs, recompute in itertools.product(
        tensor, pipeline, (1, 2, 4), micro, ("none", "full")
    ):
        if world_size % (tp * pp * cp):
            continue
        for vpp, first in _pipelines(layers, pp):
            run = copy.deepcopy(base)
            parallel = run.parallel
            parallel.tensor_model_parallel_size = tp
            parallel.sequence_parallel = tp > 1
            parallel.pipeline_model_parallel_size = pp
            parallel.virtual_pipeline_model_parallel_size = vpp
            parallel.context_parallel_size = cp
            parallel.decoder_first_pipeline_num_layers = first
            parallel.decoder_last_pipeline_num_layers = None
            run.training.micro_batch_size = mbs
            run.training.recompute_granularity = recompute
            run.training.recompute_method = "uniform"
            run.training.recompute_num_layers = 1
            replicas = parallel.data_parallel_size(world_size) * cp
            run.optimizer.overlap_grad_reduce = replicas > 1
            run.optimizer.overlap_param_gather = replicas > 1
            yield run


def _pipelines(layers: int, pp: int) -> Iterator[tuple[int | None, int | None]]:
    """Chunks per stage, and layers of the first stage where it gets fewer than the others."""
    yield None, None
    if pp == 1:
        return
    for vpp in (2, 4):
        yield vpp, None
    for first in range(max(1, layers // pp - 3), layers // pp):
        yield None, first


def popular(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Layouts people try first: the fastest micro-batch of each that exists."""
    wanted = {
        "data parallel alone": (1, 1, 1),
        "TP over the node": (8, 1, 1),
        "TP 4": (4, 1, 1),
        "TP 2 x PP 2": (2, 2, 1),
        "PP 4": (1, 4, 1),
        "TP 4 x PP 4": (4, 4, 1),
        "CP 2": (1, 1, 2),
    }
    found: dict[str, Candidate] = {}
    for name, sizes in wanted.items():
        for recompute in ("none", "full"):
            label = name + (", recomputed" if recompute == "full" else "")
            for candidate in candidates:
                parallel, training = candidate.run.parallel, candidate.run.training
                own = (
                    parallel.tensor_model_parallel_size,
                    parallel.pipeline_model_parallel_size,
                    parallel.context_parallel_size,
                )
                if own == sizes and training.recompute_granularity == recompute:
                    found[label] = candidate
                    break
    return found


def reason(candidate: Candidate, best: Candidate) -> str:
    """Main reason for preferring the best layout to this one."""
    if candidate.free < 0:
        stage = max(range(len(candidate.memory)), key=lambda n: candidate.memory[n].total)
        parts = vars(candidate.memory[stage])
        largest = max(parts, key=lambda name: parts[name])
        return (
            f"lacks {-candidate.free / 1e9:.0f} GB on stage {stage}, even at "
            f"micro-batch {candidate.run.training.micro_batch_size}: mostly {largest} "
            f"({parts[largest] / 1e9:.0f} GB)"
        )
    slower = candidate.time.total / best.time.total - 1
    if abs(slower) <= INDISTINGUISHABLE:
        return f"as fast, as far as this model can tell ({slower:+.0%})"
    extra = {name: s - best.time.parts[name] for name, s in candidate.time.parts.items()}
    worst = max(extra, key=lambda name: extra[name])
    return f"{slower:.0%} slower, mostly {worst.replace('_', ' ')} (+{extra[worst]:.2f} s a step)"
