"""Checks of the sizes of model and layout."""

from collections.abc import Iterator

from megatron_croc.config.run import RunConfig


def find_layout_faults(run: RunConfig, world_size: int) -> list[str]:
    """List the faults of building the model and cutting it over `world_size` processes."""
    faults = list(_not_positive(run, world_size))
    if faults:
        return faults  # the checks below divide by these sizes
    return [
        *_vision_faults(run),
        *_language_model_faults(run),
        *_tensor_parallel_faults(run),
        *_pipeline_faults(run),
        *_sequence_faults(run),
        *_batch_faults(run, world_size),
    ]


def _not_positive(run: RunConfig, world_size: int) -> Iterator[str]:
    vision, llm, parallel = run.model.vision_tower, run.model.language_model, run.parallel
    sizes: dict[str, float | None] = {
        "world_size": world_size,
        "img_size": vision.img_size,
        "patch_dim": vision.patch_dim,
        "vision_num_layers": vision.vision_num_layers,
        "vision_hidden_size": vision.vision_hidden_size,
        "vision_ffn_hidden_size": vision.vision_ffn_hidden_size,
        "vision_num_attention_heads": vision.vision_num_attention_heads,
        "vision_norm_epsilon": vision.vision_norm_epsilon,
        "num_layers": llm.num_layers,
        "hidden_size": llm.hidden_size,
        "ffn_hidden_size": llm.ffn_hidden_size,
        "num_attention_heads": llm.num_attention_heads,
        "num_query_groups": llm.num_query_groups,
        "kv_channels": llm.kv_channels,
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "rotary_base": llm.rotary_base,
        "norm_epsilon": llm.norm_epsilon,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "decoder_first_pipeline_num_layers": parallel.decoder_first_pipeline_num_layers,
        "decoder_last_pipeline_num_layers": parallel.decoder_last_pipeline_num_layers,
        "distributed_timeout_minutes": parallel.distributed_timeout_minutes,
        "seq_length": run.data.seq_length,
        "micro_batch_size": run.training.micro_batch_size,
        "global_batch_size": run.training.global_batch_size,
    }
    for name, size in sizes.items():
        if size is not None and size <= 0:
            yield f"{name}={size}: must be positive"


def _vision_faults(run: RunConfig) -> Iterator[str]:
    vision = run.model.vision_tower
    if vision.img_size < vision.patch_dim:
        yield f"img_size={vision.img_size}: smaller than one patch (patch_dim={vision.patch_dim})"
    # SigLIP's patches leave out the last pixels (384 = 27 * 14 + 6); CLIP's cover the image.
    elif vision.vision_model_type == "clip" and vision.img_size % vision.patch_dim:
        yield (
            f"img_size={vision.img_size}: must be a multiple of patch_dim={vision.patch_dim}; "
            f"{vision.covered_img_size} is the nearest below"
        )
    if vision.vision_hidden_size % vision.vision_num_attention_heads:
        yield (
            f"vision_hidden_size={vision.vision_hidden_size}: must be a multiple of "
            f"vision_num_attention_heads={vision.vision_num_attention_heads}"
        )
    if not 1 <= vision.num_active_layers <= vision.vision_num_layers:
        yield (
            f"vision_select_layer={vision.vision_select_layer}: a tower of vision_num_layers="
            f"{vision.vision_num_layers} has the hidden states 1..{vision.vision_num_layers}, or "
            f"-1..-{vision.vision_num_layers} from the end"
        )
    if min(vision.image_std) <= 0:
        yield f"image_std={vision.image_std}: every value must be positive"


def _language_model_faults(run: RunConfig) -> Iterator[str]:
    llm = run.model.language_model
    if llm.kv_channels is None and llm.hidden_size % llm.num_attention_heads:
        yield (
            f"hidden_size={llm.hidden_size}: must be a multiple of num_attention_heads="
            f"{llm.num_attention_heads}, or give kv_channels"
        )
    elif llm.head_dim % 2:
        yield f"a head is {llm.head_dim} wide: rotary positions need an even width; set kv_channels"
    if llm.num_attention_heads % llm.num_query_groups:
        yield (
            f"num_query_groups={llm.num_query_groups}: must divide num_attention_heads="
            f"{llm.num_attention_heads}"
        )
    if llm.rope_scaling_type == "none" and llm.rope_scaling_factor != 1.0:
        yield (
            f"rope_scaling_factor={llm.rope_scaling_factor} without rope_scaling_type: set it to "
            "linear or llama3, or the factor to 1.0"
        )
    if llm.rope_scaling_factor < 1.0:
        yield f"rope_scaling_factor={llm.rope_scaling_factor}: must be at least 1.0"
    uses_bert = run.reconstructs and run.model.reconstruction.reconstruction_head == "bert"
    if uses_bert and llm.hidden_size % 64:
        yield (
            f"reconstruction_head=bert has heads 64 wide, and hidden_size={llm.hidden_size} is not "
            "a multiple of 64: use reconstruction_head=linear"
        )


def _tensor_parallel_faults(run: RunConfig) -> Iterator[str]:
    vision, llm, parallel = run.model.vision_tower, run.model.language_model, run.parallel
    tp = parallel.tensor_model_parallel_size
    sizes = {
        "num_attention_heads": llm.num_attention_heads,
        "num_query_groups": llm.num_query_groups,
        "ffn_hidden_size": llm.ffn_hidden_size,
        "hidden_size": llm.hidden_size,
    }
    if parallel.vision_tensor_parallel_size > 1:
        # Both towers are cut over the same tensor-parallel group.
        sizes |= {
            "vision_num_attention_heads": vision.vision_num_attention_heads,
            "vision_ffn_hidden_size": vision.vision_ffn_hidden_size,
            "vision_hidden_size": vision.vision_hidden_size,
        }
    for name, size in sizes.items():
        if size % tp:
            yield (
                f"tensor_model_parallel_size={tp}: must divide {name}={size}; "
                f"{_largest_divisor(size, tp)} is the next smaller divisor"
            )
    if parallel.sequence_parallel and tp == 1:
        yield (
            "sequence_parallel needs tensor_model_parallel_size > 1: unset it, or raise "
            "tensor_model_parallel_size"
        )


def _largest_divisor(size: int, limit: int) -> int:
    return next(n for n in range(min(limit, size), 0, -1) if size % n == 0)


def _pipeline_faults(run: RunConfig) -> Iterator[str]:
    parallel, num_layers = run.parallel, run.model.language_model.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    given = {
        name: value
        for name, value in {
            "decoder_first_pipeline_num_layers": parallel.decoder_first_pipeline_num_layers,
            "decoder_last_pipeline_num_layers": parallel.decoder_last_pipeline_num_layers,
        }.items()
        if value is not None
    }
    if pp == 1:
        for name, value in given.items():
            yield f"{name}={value}: needs pipeline_model_parallel_size > 1; set it to none"
        if vpp is not None:
            yield (
                f"virtual_pipeline_model_parallel_size={vpp}: needs "
                "pipeline_model_parallel_size > 1; set it to none"
            )
        return
    others, rest = pp - len(given), num_layers - sum(given.values())
    shown = "".join(f" less {name}={value}" for name, value in given.items())
    if rest < others or (others == 0 and rest) or (others and rest % others):
        yield (
            f"num_layers={num_layers}{shown}: {rest} layers cannot be split evenly over {others} "
            f"pipeline stages; choose a pipeline_model_parallel_size (now {pp}) that divides them, "
            "or set decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers"
        )
    elif vpp is not None:
        for layers in sorted(set(parallel.pipeline_layers(num_layers))):
            if layers % vpp:
                yield (
                    f"virtual_pipeline_model_parallel_size={vpp}: must divide the {layers} layers "
                    "of every pipeline stage"
                )


def _sequence_faults(run: RunConfig) -> Iterator[str]:
    parallel, seq_length = run.parallel, run.data.seq_length
    num_visual_tokens = run.model.vision_tower.num_visual_tokens
    if seq_length <= num_visual_tokens:
        yield (
            f"seq_length={seq_length}: one image alone takes {num_visual_tokens} tokens "
            f"(img_size, patch_dim); raise seq_length"
        )
    pieces = parallel.context_parallel_size
    if parallel.sequence_parallel:
        pieces *= parallel.tensor_model_parallel_size
    if seq_length % pieces:
        yield (
            f"seq_length={seq_length}: must be a multiple of {pieces} (context_parallel_size, "
            "times tensor_model_parallel_size with sequence_parallel)"
        )


def _batch_faults(run: RunConfig, world_size: int) -> Iterator[str]:
    training, parallel = run.training, run.parallel
    if world_size % parallel.model_parallel_size:
        yield (
            f"world_size={world_size}: must be a multiple of tensor_model_parallel_size="
            f"{parallel.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} x context_parallel_size="
            f"{parallel.context_parallel_size} = {parallel.model_parallel_size}"
        )
        return
    dp = parallel.data_parallel_size(world_size)
    per_pass = training.micro_batch_size * dp
    if training.global_batch_size % per_pass:
        yield (
            f"global_batch_size={training.global_batch_size}: must be a multiple of "
            f"micro_batch_size={training.micro_batch_size} x data_parallel_size={dp} = {per_pass}"
        )
    elif parallel.virtual_pipeline_model_parallel_size is not None:
        pp, count = parallel.pipeline_model_parallel_size, run.num_microbatches(world_size)
        # megatron-core's interleaved schedule works in groups of pp micro-batches.
        if count % pp:
            yield (
                f"virtual_pipeline_model_parallel_size needs micro-batches in groups of "
                f"pipeline_model_parallel_size={pp}, and global_batch_size="
                f"{training.global_batch_size} gives {count}: change micro_batch_size or "
                "global_batch_size"
            )
