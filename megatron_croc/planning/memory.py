"""Memory of one rank of each pipeline stage, estimated from the configuration.

Assumptions: samples as long as seq_length with one image each, unless given; the fused norm and
attention kernels of a GPU (neither keeps a square of scores or a second copy); float32 gradient
buffers; no fragmentation, so keep a tenth free. What a layer saves for backward
was counted in the code that runs, as Korthikanti et al. (arXiv 2205.05198) do for theirs;
tests/distributed/test_memory_estimate.py holds it against what is really allocated.
"""

import math
from dataclasses import dataclass

from megatron_croc.config.parts import trained_parts as find_trained_parts
from megatron_croc.config.run import RunConfig
from megatron_croc.model.parameters import Parameters, padded_vocab_size, stage_parameters

_MAIN_AND_MOMENTS = 12  # bytes: a float32 copy of each bf16 weight, and Adam's two moments
_MOMENTS = 8  # bytes: float32 weights are their own main copy


GATHERED = 2**27
"""Bytes of optimizer state that saving gathers at once (checkpoint/shares.py, MAX_GATHERED)."""


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
    """Tensors that all micro-batches in flight keep for their backward pass."""

    logits: float
    """The softmax of the logits, in float32, kept for backward (last stage)."""

    recomputed: float
    """Activations of recomputed layers, beyond the memory that the loss has freed by then."""

    workspace: float
    """Temporary tensors of the running layer, or of the loss where those are larger."""

    construction: float
    """All there is at the fullest moment of the start; not a part of the step."""

    saving: float
    """All there is while a checkpoint is gathered; not a part of the step."""

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of each part of the step's peak."""
        return {k: v for k, v in vars(self).items() if k not in ("construction", "saving")}

    @property
    def total(self) -> float:
        """Peak of a step in bytes: the sum of its parts."""
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        """Peak of the whole run in bytes: of the start, a step or a checkpoint."""
        return max(self.total, self.construction, self.saving)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The largest pack of a micro-batch, before context parallelism cuts it."""

    tokens: float
    """Visual tokens included."""

    images: float
    """Images in it."""

    labels: float
    """Labelled positions, which have logits."""


def longest_pack(run: RunConfig) -> Pack:
    """micro_batch_size samples of seq_length with an image each; with packing, images only.

    Every position counts as labelled too: such a pack may be of text alone.
    """
    samples, length = run.training.micro_batch_size, run.data.row_length
    images = length // run.model.vision_tower.num_visual_tokens if run.data.packing else 1
    return Pack(tokens=samples * length, images=samples * images, labels=samples * length)


def estimate_memory(
    run: RunConfig, world_size: int, pack: Pack | None = None
) -> list[MemoryEstimate]:
    """The estimate for one rank of each pipeline stage.

    Args:
        run: the run.
        world_size: processes.
        pack: what a micro-batch holds at most; default `longest_pack`.
    """
    pack = longest_pack(run) if pack is None else pack
    return [_estimate_stage(run, world_size, stage, pack) for stage in range(_num_stages(run))]


def _num_stages(run: RunConfig) -> int:
    return run.parallel.pipeline_model_parallel_size


def _stage_output(run: RunConfig) -> float:
    """Number of values per token that a stage sends to the next, on one tensor-parallel rank."""
    parallel = run.parallel
    cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return run.model.language_model.hidden_size / cut


def _bytes(run: RunConfig) -> int:
    return 2 if run.training.bf16 else 4


def _estimate_stage(run: RunConfig, world_size: int, stage: int, pack: Pack) -> MemoryEstimate:
    parallel, element = run.parallel, _bytes(run)
    tp = parallel.tensor_model_parallel_size
    parts = stage_parameters(run.model, run.parallel, reconstructs=run.reconstructs)[stage]
    trained_names = find_trained_parts(run.training, reconstructs=run.reconstructs)
    held = sum(parts.values(), Parameters()).on_rank(tp)
    trained = sum(p.on_rank(tp) for name, p in parts.items() if name in trained_names)
    per_parameter = _MAIN_AND_MOMENTS if run.training.bf16 else _MOMENTS
    # The distributed optimizer also spreads over context-parallel ranks, which hold equal weights.
    spread = parallel.data_parallel_size(world_size) * parallel.context_parallel_size
    is_first, is_last = stage == 0, stage == _num_stages(run) - 1
    tokens = pack.tokens / parallel.context_parallel_size
    activations = redone = after = 0.0
    if _keeps_activations(run):
        activations, redone = _decoder_activations(run, world_size, stage, tokens)
    if is_first:
        in_flight = micro_batches_in_flight(run, world_size, stage)
        activations += _vision_activations(run, pack.images) * in_flight
    if parallel.virtual_pipeline_model_parallel_size is not None:
        # The last output stays until the next one is sent (parallel/pipeline.py).
        activations += tokens * element * _stage_output(run)
    columns = padded_vocab_size(run.model.language_model.vocab_size, tp) // tp
    # Context parallelism spreads positions evenly, but not the labelled ones.
    labels = min(pack.labels, tokens) if is_last else 0.0
    logits = min(labels, run.training.logits_chunk) * columns * 4.0
    if is_last:
        outside = tp if parallel.sequence_parallel else 1
        # Input and output of the final norm.
        hidden_size = run.model.language_model.hidden_size
        after = tokens * element * 2 * hidden_size / outside
        after += labels * element * hidden_size  # input of the output layer
        if run.reconstructs:
            after += _head_activations(run, pack)
    copy = logits / 2 if run.training.bf16 else 0.0  # the bf16 logits, later their gradient
    weights, gradients, optimizer = held * element, trained * 4, trained * per_parameter / spread
    # DDP allocates both buffers of a model chunk before it frees the weights that it copies.
    copied = trained * element / (parallel.virtual_pipeline_model_parallel_size or 1)
    state, building = weights + gradients + optimizer, weights + gradients + copied
    # A piece of the optimizer's state is gathered while the piece before it is still there, and
    # with this rank's own part of it.
    gathered = min(_MAIN_AND_MOMENTS * trained, 2 * GATHERED)
    gathered += min(_MAIN_AND_MOMENTS * trained, GATHERED) / spread
    return MemoryEstimate(
        construction=max(state, building),
        saving=state + gathered,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations + after,
        logits=logits,
        recomputed=max(0.0, redone - after - logits),
        workspace=max(tokens * element * _layer_workspace(run), copy),
    )


def _keeps_activations(run: RunConfig) -> bool:
    """True when the layers have a backward pass: they or their inputs are trained."""
    return bool(
        find_trained_parts(run.training, reconstructs=run.reconstructs) - {"reconstruction_head"}
    )


def micro_batches_in_flight(run: RunConfig, world_size: int, stage: int) -> float:
    """Largest number of forward passes of a stage before its first backward pass."""
    pp = run.parallel.pipeline_model_parallel_size
    vpp = run.parallel.virtual_pipeline_model_parallel_size
    count = run.num_microbatches(world_size)
    if vpp is None:
        return min(pp - stage, count)
    # Warm-up of the interleaved schedule, in passes of one of vpp chunks.
    passes = 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
    return min(passes / vpp, count)


def _layer_values(run: RunConfig) -> float:
    """Number of values that a layer saves per token, on one tensor-parallel rank."""
    config, parallel = run.model.language_model, run.parallel
    tp = parallel.tensor_model_parallel_size
    outside = tp if parallel.sequence_parallel else 1
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_query_groups * config.head_dim
    # Inputs of both norms and of what follows them. The QKV product (values are a part of it),
    # rotated queries and keys, the attention's output. Of SwiGLU: gate and up in one tensor and
    # their product; unfused also the activated gate, and up once more (megatron adds 0 to it).
    swiglu = 3 if run.training.bias_swiglu_fusion else 5
    cut = 3 * queries + 3 * keys + swiglu * config.ffn_hidden_size
    whole = 4 * config.hidden_size
    rotary = 4 * config.head_dim  # sine and cosine, for queries and for keys
    if run.training.freeze_LM:  # frozen weights need no inputs of their own
        cut -= config.ffn_hidden_size
        whole -= 2 * config.hidden_size
    return whole / outside + cut / tp + rotary


def _layer_workspace(run: RunConfig) -> float:
    """Temporary values per token in a layer's backward pass: those of SwiGLU."""
    config, tp = run.model.language_model, run.parallel.tensor_model_parallel_size
    return 4 * config.ffn_hidden_size / tp + 2 * config.hidden_size


def _decoder_activations(
    run: RunConfig, world_size: int, stage: int, tokens: float
) -> tuple[float, float]:
    """Bytes that all micro-batches in flight keep, and bytes recomputed in one of them."""
    training, config = run.training, run.model.language_model
    layers = run.parallel.pipeline_layers(config.num_layers)[stage]
    outside = run.parallel.tensor_model_parallel_size if run.parallel.sequence_parallel else 1
    layer, layer_input = _layer_values(run), config.hidden_size / outside
    kept, redone = layers * layer, 0.0
    if training.recompute_granularity == "full":
        n = min(training.recompute_num_layers, layers)
        if training.recompute_method == "uniform":
            kept, redone = math.ceil(layers / n) * layer_input, n * layer
        else:
            # The layers that are not redone come later, so backward has freed them by then.
            kept, redone = n * layer_input + (layers - n) * layer, layer * (n == layers)
    per_value = tokens * _bytes(run)
    return per_value * kept * micro_batches_in_flight(run, world_size, stage), per_value * redone


def _vision_activations(run: RunConfig, images: float) -> float:
    """Bytes of vision tower and projector, for one micro-batch."""
    config, element = run.model.vision_tower, _bytes(run)
    tp, tower_tp = run.parallel.tensor_model_parallel_size, run.parallel.vision_tensor_parallel_size
    per_image = config.num_visual_tokens + (config.vision_model_type == "clip")
    tokens = images * per_image
    own_tokens = math.ceil(images / run.parallel.image_share_size) * per_image
    h = config.vision_hidden_size
    # quick_gelu keeps its input and the sigmoid, gelu_tanh its input; both the output.
    widths = 3 if config.vision_activation == "quick_gelu" else 2
    layer = 4 * h + (4 * h + widths * config.vision_ffn_hidden_size) / tower_tp
    if run.training.freeze_ViT:
        tower = 0.0
    elif run.training.recompute_vision:
        tower = config.num_active_layers * h + layer
    else:
        tower = config.num_active_layers * layer
    # Projector: its input, the hidden layer before and after GELU, what the L2 norm divides.
    hidden = run.model.language_model.hidden_size
    is_trained = not (run.training.freeze_projector and run.training.freeze_ViT)
    projector = (h + 2 * hidden / tp + 2 * hidden) * is_trained
    return element * (own_tokens * tower + tokens * projector)


def _head_activations(run: RunConfig, pack: Pack) -> float:
    """Bytes of the reconstruction head and its loss on one CP rank, for one micro-batch."""
    images = math.ceil(pack.images / run.parallel.context_parallel_size)
    per_image, element = run.model.vision_tower.num_visual_tokens, _bytes(run)
    hidden_size = run.model.language_model.hidden_size
    config = run.model.reconstruction
    values = 2.0 * per_image * hidden_size
    if config.reconstruction_head == "bert":
        # 12 widths in attention and norms, 8 in the feed-forward of 4; the weights of attention,
        # which dropout keeps three times (SDPA without dropout keeps none).
        values = 20.0 * per_image * hidden_size
        if config.reconstruction_dropout:
            values += 3 * per_image**2 * max(1, hidden_size // 64)
    loss = 2 * 4 * per_image * hidden_size  # prediction and target in float32
    return images * (values * element + loss)
