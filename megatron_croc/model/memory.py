"""What one rank of each pipeline stage holds in memory: an estimate, from the configuration.

It assumes samples as long as seq_length with one image each, an attention kernel that keeps no
square of scores, float32 gradient buffers, and nothing lost to fragmentation, so keep a tenth
free. Shapes of what a layer saves for backward follow Korthikanti et al. (arXiv 2205.05198),
redone for SwiGLU.
"""

import math
from dataclasses import dataclass

from megatron_croc.config.run import RunConfig
from megatron_croc.model.parameters import Parameters, padded_vocab_size, stage_parameters
from megatron_croc.model.parameters import trained_parts as find_trained_parts

_MAIN_AND_MOMENTS = 12  # bytes: a float32 copy of each bf16 weight, and Adam's two moments
_MOMENTS = 8  # bytes: float32 weights are their own main copy


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank of a pipeline stage."""

    weights: float
    """Parameters in the precision of the forward pass."""

    gradients: float
    """float32 gradient buffers of the trained parameters."""

    optimizer: float
    """Main weights and moments, over the data-parallel ranks with the distributed optimizer."""

    activations: float
    """What all micro-batches in flight keep for their backward pass."""

    logits: float
    """Logits, their float32 copy and gradient (last stage)."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(run: RunConfig, world_size: int) -> list[MemoryEstimate]:
    """The estimate for one rank of each pipeline stage."""
    return [_estimate_stage(run, world_size, stage) for stage in range(_num_stages(run))]


def _num_stages(run: RunConfig) -> int:
    return run.parallel.pipeline_model_parallel_size


def _bytes(run: RunConfig) -> int:
    return 2 if run.training.bf16 else 4


def _estimate_stage(run: RunConfig, world_size: int, stage: int) -> MemoryEstimate:
    parallel, element = run.parallel, _bytes(run)
    tp = parallel.tensor_model_parallel_size
    parts = stage_parameters(run)[stage]
    trained_names = find_trained_parts(run)
    held = sum(parts.values(), Parameters()).on_rank(tp)
    trained = sum(p.on_rank(tp) for name, p in parts.items() if name in trained_names)
    per_parameter = _MAIN_AND_MOMENTS if run.training.bf16 else _MOMENTS
    # The distributed optimizer also spreads over context-parallel ranks, which hold equal weights.
    spread = parallel.data_parallel_size(world_size) * parallel.context_parallel_size
    is_first, is_last = stage == 0, stage == _num_stages(run) - 1
    activations = _decoder_activations(run, world_size, stage)
    if is_first:
        activations += _vision_activations(run) * _micro_batches_in_flight(run, world_size, stage)
    if is_last and run.reconstructs:
        activations += _head_activations(run)
    return MemoryEstimate(
        weights=held * element,
        gradients=trained * 4,
        optimizer=trained * per_parameter / spread,
        activations=activations,
        logits=_logits(run) if is_last else 0.0,
    )


def _tokens(run: RunConfig) -> float:
    """Tokens of the longest possible micro-batch on one context-parallel rank."""
    tokens = run.training.micro_batch_size * run.data.seq_length
    return tokens / run.parallel.context_parallel_size


def _micro_batches_in_flight(run: RunConfig, world_size: int, stage: int) -> float:
    """Forward passes a stage has done, at most, before its first backward pass."""
    pp = run.parallel.pipeline_model_parallel_size
    vpp = run.parallel.virtual_pipeline_model_parallel_size
    count = run.num_microbatches(world_size)
    if vpp is None:
        return min(pp - stage, count)
    # Warm-up of the interleaved schedule, in passes of one of vpp chunks.
    passes = 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
    return min(passes / vpp, count)


def _decoder_activations(run: RunConfig, world_size: int, stage: int) -> float:
    training, config = run.training, run.model.language_model
    layers = run.parallel.pipeline_layers(config.num_layers)[stage]
    tp, element = run.parallel.tensor_model_parallel_size, _bytes(run)
    outside = tp if run.parallel.sequence_parallel else 1
    h = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_query_groups * config.head_dim
    # Inputs of both norms and of what follows them; queries, keys, values and the attention's
    # output; gate, up and their product.
    layer = 4 * h / outside + (2 * queries + 2 * keys + 3 * config.ffn_hidden_size) / tp
    layer_input = h / outside
    in_flight = _micro_batches_in_flight(run, world_size, stage)
    if training.recompute_granularity == "full":
        n = min(training.recompute_num_layers, layers)
        if training.recompute_method == "uniform":
            kept, redone = math.ceil(layers / n) * layer_input, n * layer
        else:
            kept, redone = n * layer_input + (layers - n) * layer, layer
        return _tokens(run) * element * (kept * in_flight + redone)
    return _tokens(run) * element * layers * layer * in_flight


def _vision_activations(run: RunConfig) -> float:
    """Vision tower and projector, for one micro-batch."""
    config, element = run.model.vision_tower, _bytes(run)
    tp = run.parallel.tensor_model_parallel_size
    images = run.training.micro_batch_size
    tokens = images * (config.num_visual_tokens + (config.vision_model_type == "clip"))
    h = config.vision_hidden_size
    layer = 4 * h + (4 * h + 2 * config.vision_ffn_hidden_size) / tp
    if run.training.freeze_ViT:
        tower = layer  # one layer at work at a time
    elif run.training.recompute_vision:
        tower = config.num_active_layers * h + layer
    else:
        tower = config.num_active_layers * layer
    # Projector: its input, the hidden layer before and after GELU, its output, and the norm's.
    hidden = run.model.language_model.hidden_size
    projector = h + 2 * hidden / tp + 2 * hidden
    return tokens * element * (tower + projector)


def _head_activations(run: RunConfig) -> float:
    """Reconstruction head and its loss, for one micro-batch."""
    tokens = run.training.micro_batch_size * run.model.vision_tower.num_visual_tokens
    is_bert = run.model.reconstruction.reconstruction_head == "bert"
    widths = 20 if is_bert else 2  # of hidden_size: 12 in attention and norms, 8 in the 4h layers
    loss = 3 * 4  # bytes: prediction, target and gradient in float32
    hidden_size = run.model.language_model.hidden_size
    return tokens * hidden_size * (widths * _bytes(run) + loss)


def _logits(run: RunConfig) -> float:
    tp = run.parallel.tensor_model_parallel_size
    columns = padded_vocab_size(run.model.language_model.vocab_size, tp) // tp
    return _tokens(run) * columns * (_bytes(run) + 4 + 4)
