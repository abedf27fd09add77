"""Estimated seconds of one optimizer step: compute, communication, pipeline bubble.

Compute is operations over (peak x efficiency); links are bytes over rate; the pipeline takes the
sum of its stages once and the slowest stage for every further micro-batch. Left out: kernel
launches, the optimizer's own update, data loading, checkpoints.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np

from megatron_croc.config.parts import trained_parts
from megatron_croc.config.run import RunConfig
from megatron_croc.costs.flops import Flops, Work, count_flops
from megatron_croc.model.parameters import stage_parameters
from megatron_croc.planning.gpus import Gpu
from megatron_croc.planning.replicas import balanced_imbalance
from megatron_croc.planning.workload import Workload

MATCHING_SECONDS = 0.01
"""Time of one image's one-to-one matching (assumption: about scipy's on one CPU core)."""

LATENCY = 2e-5
"""Latency of one collective in seconds (assumption)."""

HIDDEN_BACKWARD = 0.5
"""Share of tensor-parallel traffic of the backward pass that hides behind compute (assumption)."""

HIDDEN_DATA_PARALLEL = 0.8
"""Share of data-parallel traffic hidden with overlap_grad_reduce and overlap_param_gather, while
there is backward compute to hide it behind (assumption)."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step by cause; they add up to `total`."""

    compute: float
    """Useful operations of the slowest stage."""

    recompute: float
    """Recomputed forward passes."""

    tensor_parallel: float
    context_parallel: float
    pipeline_traffic: float
    bubble: float
    """Idle time while the pipeline fills and drains."""

    matching: float
    data_parallel: float
    imbalance: float
    """Idle time of the other replicas while the one with the longest samples computes."""

    tokens: float
    """Tokens of one step."""

    flops: float
    """Useful operations of one step, all ranks."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by cause."""
        return {k: v for k, v in vars(self).items() if k not in ("tokens", "flops")}

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())

    def mfu(self, world_size: int, gpu: Gpu) -> float:
        """Model FLOPs utilization: useful operations per second divided by the peak."""
        return self.flops / self.total / world_size / gpu.peak


def estimate_step(run: RunConfig, world_size: int, gpu: Gpu, workload: Workload) -> StepTime:
    """Estimate the time of one step of `run` at its layout."""
    parallel, config = run.parallel, run.model.language_model
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    dp, count = parallel.data_parallel_size(world_size), run.num_microbatches(world_size)
    micro = run.training.micro_batch_size
    work = workload.work(run, micro)
    tokens = work.num_tokens / cp
    rate = gpu.peak * gpu.efficiency * _fullness(config.hidden_size / tp, tokens)
    flops = count_flops(run, work)

    # Seconds of one micro-batch: of one layer, and of what only the first and last stage have.
    model = flops["language_model"]
    logits = 2.0 * work.num_labels * config.hidden_size * config.vocab_size
    forward = count_flops(_frozen(run), work)["language_model"]
    logits *= model / forward
    layer = (model - logits) / config.num_layers / tp / cp / rate
    again = 0.0
    if run.training.recompute_granularity == "full":
        again = layer * forward / model
        if run.training.recompute_method == "block":
            again *= run.training.recompute_num_layers / min(
                parallel.pipeline_layers(config.num_layers)
            )
    traffic = _tensor_traffic(run, tokens, gpu) + _context_traffic(run, tokens, gpu)
    vision = flops["projector"] / tp / rate + _tower_seconds(run, work, flops, tokens, gpu)
    vision_traffic = _vision_traffic(run, work, gpu)
    matches = 0.0
    if run.reconstructs and run.model.prompt_pool.assign_mode == "hungarian":
        matches = math.ceil(work.num_images / tp / cp) * MATCHING_SECONDS
    last = logits / tp / cp / rate + flops.get("reconstruction_head", 0.0) / cp / rate

    layers = np.array(parallel.pipeline_layers(config.num_layers), float)
    useful = layers * layer
    useful[0] += vision
    useful[-1] += last
    stages = useful + layers * (again + traffic)
    stages[0] += matches + vision_traffic
    hop = 0.0
    if pp > 1:
        width = config.hidden_size / (tp if parallel.sequence_parallel else 1)
        rate_between = gpu.link if world_size <= gpu.gpus_per_node else gpu.network
        hop = 2 * tokens * width * _element(run) / rate_between * (vpp or 1)
    slow = int(stages.argmax())
    pipeline = count * (stages[slow] + hop)
    bubble = (stages.sum() - stages[slow] + (pp - 1) * hop) / (vpp or 1)
    data = _data_traffic(run, world_size, gpu, backward=2 / 3 * useful[slow])
    imbalance = 0.0
    if dp > 1 and run.data.balance_replicas is not None:
        imbalance = balanced_imbalance(run, workload, dp) * pipeline
    elif dp > 1:
        deviation = float(np.std(workload.lengths)) / workload.mean
        imbalance = deviation * math.sqrt(2 * math.log(dp) / (count * micro)) * pipeline
    return StepTime(
        compute=count * float(useful[slow]),
        recompute=count * float(layers[slow] * again),
        tensor_parallel=count
        * (
            float(layers[slow]) * _tensor_traffic(run, tokens, gpu)
            + (vision_traffic if slow == 0 else 0.0)
        ),
        context_parallel=count * float(layers[slow]) * _context_traffic(run, tokens, gpu),
        pipeline_traffic=count * hop,
        bubble=float(bubble),
        matching=count * matches if slow == 0 else 0.0,
        data_parallel=data,
        imbalance=imbalance,
        tokens=work.num_tokens * count * dp,
        flops=sum(flops.values()) * count * dp,
    )


def _element(run: RunConfig) -> int:
    return 2 if run.training.bf16 else 4


def _fullness(width: float, tokens: float) -> float:
    """Efficiency of small matrix products, relative to large ones; a model, not a measurement."""
    return width / (width + 64) * tokens / (tokens + 128)


def _frozen(run: RunConfig) -> RunConfig:
    """Copy of the run with all parts frozen: its operations are those of the forward pass."""
    frozen = copy.deepcopy(run)
    frozen.stage = "finetune"
    training = frozen.training
    training.freeze_LM = training.freeze_ViT = training.freeze_projector = True
    return frozen


def _tensor_traffic(run: RunConfig, tokens: float, gpu: Gpu) -> float:
    """Seconds of one layer and micro-batch that tensor-parallel collectives add."""
    tp = run.parallel.tensor_model_parallel_size
    if tp == 1:
        return 0.0
    rate = gpu.link if tp <= gpu.gpus_per_node else gpu.network
    # A gather or a scatter-reduce; an all-reduce is one of each. Two of each forward and backward;
    # with sequence parallelism inputs are gathered again for the weights' gradients.
    one = tokens * run.model.language_model.hidden_size * _element(run) * (tp - 1) / tp / rate
    one += LATENCY
    again = 4 if run.training.recompute_granularity == "full" else 0
    backward = 6 if run.parallel.sequence_parallel else 4
    return one * (4 + again + backward * (1 - HIDDEN_BACKWARD))


def _tower_seconds(run: RunConfig, work: Work, flops: Flops, tokens: float, gpu: Gpu) -> float:
    """Seconds of the vision tower for one micro-batch, on the rank with the most images."""
    parallel = run.parallel
    share = 1.0
    if work.num_images:
        share = math.ceil(work.num_images / parallel.image_share_size) / work.num_images
    width = run.model.language_model.hidden_size / parallel.vision_tensor_parallel_size
    rate = gpu.peak * gpu.efficiency * _fullness(width, tokens)
    return flops["vision_tower"] * share / parallel.vision_tensor_parallel_size / rate


def _vision_traffic(run: RunConfig, work: Work, gpu: Gpu) -> float:
    """Seconds of one micro-batch that collectives of the vision tower add to the first stage.

    heads: two all-reduces of each layer, in backward too if the tower is trained. images: one
    gather of features, and in backward their sum over context-parallel ranks.
    """
    config, parallel = run.model.vision_tower, run.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if tp * cp == 1 or not work.num_images:
        return 0.0
    rate = gpu.link if tp * cp <= gpu.gpus_per_node else gpu.network
    features = work.num_images * config.num_visual_tokens * config.vision_hidden_size
    values = features * _element(run)
    is_trained = not run.training.freeze_ViT
    if parallel.split_vision == "images":
        ranks = tp * cp
        gather = values * (ranks - 1) / ranks / rate + LATENCY
        total = 2 * values / tp * (cp - 1) / cp / rate + LATENCY * (cp > 1)
        return gather + is_trained * total
    if tp == 1:
        return 0.0
    all_reduce = 2 * (values * (tp - 1) / tp / rate + LATENCY)
    again = is_trained * (1 + run.training.recompute_vision)
    return config.num_active_layers * 2 * all_reduce * (1 + again)


def _context_traffic(run: RunConfig, tokens: float, gpu: Gpu) -> float:
    """Seconds of one layer and micro-batch that context parallelism adds."""
    cp, tp = run.parallel.context_parallel_size, run.parallel.tensor_model_parallel_size
    if cp == 1:
        return 0.0
    config = run.model.language_model
    rate = gpu.link if tp * cp <= gpu.gpus_per_node else gpu.network
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_query_groups * config.head_dim
    if (config.num_query_groups // tp) % cp == 0:  # all-to-all over heads
        values = (2 * queries + 2 * keys) / tp * (cp - 1) / cp
    else:  # keys and values are gathered
        values = 2 * keys / tp * (cp - 1)
    passes = 4 if run.training.recompute_granularity == "full" else 3
    return passes * (tokens * values * _element(run) / rate + 4 * LATENCY)


def _data_traffic(run: RunConfig, world_size: int, gpu: Gpu, *, backward: float) -> float:
    """Seconds of gradient reduction and parameter gathering that are not hidden."""
    parallel = run.parallel
    tp = parallel.tensor_model_parallel_size
    group = parallel.data_parallel_size(world_size) * parallel.context_parallel_size
    if group == 1:
        return 0.0
    names = trained_parts(run.training, reconstructs=run.reconstructs)
    trained = max(
        sum(p.on_rank(tp) for name, p in parts.items() if name in names)
        for parts in stage_parameters(run.model, run.parallel, reconstructs=run.reconstructs)
    )
    traffic = trained * (4 + _element(run)) * (group - 1) / group
    rate = gpu.link
    if tp * group > gpu.gpus_per_node:  # a node's members of the group share its adapters
        rate = min(gpu.link, gpu.network * max(1, gpu.gpus_per_node // tp))
    seconds = traffic / rate
    if run.optimizer.overlap_grad_reduce:
        return seconds - min(HIDDEN_DATA_PARALLEL * seconds, backward)
    return seconds
