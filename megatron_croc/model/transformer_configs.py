"""TransformerConfig of megatron-core for each part of the model."""

from functools import partial

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from megatron_croc.config.model import LanguageModelConfig, VisionTowerConfig
from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.config.training import TrainingConfig
from megatron_croc.model.transformer_engine import fp8_settings
from megatron_croc.parallel.device import has_cuda


def params_dtype(training: TrainingConfig) -> torch.dtype:
    """Dtype of weights and activations."""
    return torch.bfloat16 if training.bf16 else torch.float32


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


gelu_tanh = partial(functional.gelu, approximate="tanh")

_VISION_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


def _common(parallel: ParallelConfig, training: TrainingConfig) -> dict:
    """Fields shared by all parts. megatron draws no weights; `initialization` does it later."""
    dtype = params_dtype(training)
    return {
        "params_dtype": dtype,
        "bf16": training.bf16,
        "deterministic_mode": training.deterministic,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }


def language_model_config(
    model: LanguageModelConfig, *, parallel: ParallelConfig, training: TrainingConfig
) -> TransformerConfig:
    """Configuration of a Llama or Qwen2.5 decoder; the pipeline schedule reads it too."""
    granularity = (
        None if training.recompute_granularity == "none" else training.recompute_granularity
    )
    full = granularity == "full"
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        **_common(parallel, training),
        **fp8_settings(training),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=functional.silu,
        bias_activation_fusion=training.bias_swiglu_fusion and has_cuda(),
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=granularity,
        recompute_method=training.recompute_method if full else None,
        recompute_num_layers=training.recompute_num_layers if full else None,
        # Packs differ in length; parallel/pipeline.py knows each length. megatron requires this
        # dispatcher with variable lengths, even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=True,
        # megatron 0.16: batched point-to-point gives wrong results without an error under the
        # interleaved schedule at PP 2.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # No device sync after each call: it would also wait for the open sends of the target
        # channel, which the last stage cannot receive yet (deadlock). NCCL no longer needs it.
        batch_p2p_sync=False,
        # Losses are already divided by global counts; megatron must not average them again.
        calculate_per_token_loss=True,
    )


def vision_tower_config(
    model: VisionTowerConfig, *, parallel: ParallelConfig, training: TrainingConfig
) -> TransformerConfig:
    """Configuration of a CLIP or SigLIP encoder, on the first pipeline stage."""
    recompute = training.recompute_vision and not training.freeze_ViT
    common = _common(parallel, training)
    common["tensor_model_parallel_size"] = parallel.vision_tensor_parallel_size
    return TransformerConfig(
        **common,
        num_layers=model.num_active_layers,
        hidden_size=model.vision_hidden_size,
        ffn_hidden_size=model.vision_ffn_hidden_size,
        num_attention_heads=model.vision_num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=model.vision_norm_epsilon,
        activation_func=_VISION_ACTIVATIONS[model.vision_activation],
        add_bias_linear=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


def projector_config(
    hidden_size: int, *, parallel: ParallelConfig, training: TrainingConfig
) -> TransformerConfig:
    """Configuration of mlp2x_gelu: Linear, exact GELU, Linear, with biases and width D."""
    return TransformerConfig(
        **_common(parallel, training),
        num_layers=1,
        hidden_size=hidden_size,
        ffn_hidden_size=hidden_size,
        num_attention_heads=parallel.tensor_model_parallel_size,  # unused, but must divide
        activation_func=functional.gelu,
        add_bias_linear=True,
    )
