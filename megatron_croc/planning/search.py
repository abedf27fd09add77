"""Every layout the configuration checks accept, with its memory and its time."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_croc.config.checks import find_faults
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.planning.fit import GIB, Fit, expected_fit, gpu_memory
from megatron_croc.planning.gpus import Gpu
from megatron_croc.planning.layouts import VISION, changed, layouts
from megatron_croc.planning.step_time import StepTime, estimate_step
from megatron_croc.planning.workload import Workload

INDISTINGUISHABLE = 0.05
"""Relative difference of two times below which the estimate cannot rank them."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout."""

    run: RunConfig
    fit: Fit
    time: StepTime

    @property
    def free(self) -> float:
        """Bytes left on the fullest GPU; negative: it does not fit."""
        return self.fit.free

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
        if parallel.split_vision == "images":
            words.append("images")
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
        words.append(f"--split-vision {parallel.split_vision}")
        words.append(f"--micro-batch-size {training.micro_batch_size}")
        words.append(f"--recompute-granularity {training.recompute_granularity}")
        if training.recompute_granularity == "full":
            words.append("--recompute-method uniform --recompute-num-layers 1")
        if self.run.optimizer.overlap_grad_reduce:
            words.append("--overlap-grad-reduce --overlap-param-gather")
        return " ".join(words)


def assess(run: RunConfig, world_size: int, gpu: Gpu, workload: Workload) -> Candidate:
    """Memory and time of one layout that the checks accept."""
    return Candidate(
        run=run,
        fit=expected_fit(run, world_size, gpu_memory(gpu), workload),
        time=estimate_step(run, world_size, gpu, workload),
    )


def search(base: RunConfig, world_size: int, gpu: Gpu, workload: Workload) -> list[Candidate]:
    """Every accepted layout: those that fit first, of them the fastest (near ties: fewest cuts).

    Of two that only split the vision tower differently, the better one.

    Raises:
        ConfigError: no layout of this recipe is possible at this world size.
    """
    best_split: dict[tuple, Candidate] = {}
    for changes in layouts(base, world_size, gpu.gpus_per_node):
        run = changed(base, changes)
        if find_faults(run, world_size):
            continue
        candidate = assess(run, world_size, gpu, workload)
        key = tuple(value for path, value in changes.items() if path != VISION)
        other = best_split.setdefault(key, candidate)
        if (candidate.free < 0, candidate.time.total) < (other.free < 0, other.time.total):
            best_split[key] = candidate
    found = list(best_split.values())
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
        stages = candidate.fit.stages
        stage = max(range(len(stages)), key=lambda n: stages[n].peak)
        memory = stages[stage]
        parts = memory.parts
        if memory.peak > memory.total:
            parts = {"construction": memory.construction, "saving": memory.saving}
        largest = max(parts, key=lambda name: parts[name])
        return (
            f"lacks {-candidate.free / GIB:.0f} GiB on stage {stage}, even at "
            f"micro-batch {candidate.run.training.micro_batch_size}: mostly {largest} "
            f"({parts[largest] / GIB:.0f} GiB)"
        )
    slower = candidate.time.total / best.time.total - 1
    if abs(slower) <= INDISTINGUISHABLE:
        return f"as fast, as far as this model can tell ({slower:+.0%})"
    extra = {name: s - best.time.parts[name] for name, s in candidate.time.parts.items()}
    worst = max(extra, key=lambda name: extra[name])
    return f"{slower:.0%} slower, mostly {worst.replace('_', ' ')} (+{extra[worst]:.2f} s a step)"
