"""megatron-core's TransformerConfig for each part, from our configuration."""

from functools import partial

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from megatron_croc.config.run import RunConfig
from megatron_croc.model.transformer_engine import fp8_settings
from megatron_croc.parallel.device import has_cuda


def params_dtype(run: RunConfig) -> torch.dtype:
    """Dtype of weights and activations."""
    return torch.bfloat16 if run.training.bf16 else torch.float32


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


gelu_tanh = partial(functional.gelu, approximate="tanh")

_VISION_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


def _common(run: RunConfig) -> dict:
    """Settings every part shares. Weights are drawn later, by `initialization`."""
    dtype = params_dtype(run)
    return {
        "params_dtype": dtype,
        "bf16": run.training.bf16,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": run.parallel.tensor_model_parallel_size,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }


def language_model_config(run: RunConfig) -> TransformerConfig:
    """Llama or Qwen2.5 decoder; also the configuration the pipeline schedule reads."""
    model, parallel, training = run.model.language_model, run.parallel, run.training
    granularity = (
        None if training.recompute_granularity == "none" else (training.recompute_granularity)
    )
    full = granularity == "full"
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        **_common(run),
        **fp8_settings(run),
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
        # Rows differ in length (parallel/pipeline.py knows each); megatron asks for this dispatcher
        # even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=True,
        # Batched point-to-point is silently wrong with the interleaved schedule at PP 2 (0.16).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # A wait for the whole device after each call would also wait for the target channel's open
        # sends, which the last stage cannot take yet: a deadlock. NCCL needs it no longer.
        batch_p2p_sync=False,
        # Our losses are sums divided by global counts: megatron must not average them again.
        calculate_per_token_loss=True,
    )


def vision_tower_config(run: RunConfig) -> TransformerConfig:
    """CLIP or SigLIP encoder; whole on the first pipeline stage, cut over the same TP group."""
    model = run.model.vision_tower
    recompute = run.training.recompute_vision and not run.training.freeze_ViT
    return TransformerConfig(
        **_common(run),
        num_layers=model.num_active_layers,
        hidden_size=model.vision_hidden_size,
        ffn_hidden_size=model.vision_ffn_hidden_size,
        num_attention_heads=model.vision_num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=model.vision_norm_epsilon,
        activation_func=_VISION_ACTIVATIONS[model.vision_activation],
        add_bias_linear=True,
        add_qkv_bias=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


def projector_config(run: RunConfig) -> TransformerConfig:
    """mlp2x_gelu: Linear, exact GELU, Linear, both of the language model's width, with bias."""
    hidden_size = run.model.language_model.hidden_size
    return TransformerConfig(
        **_common(run),
        num_layers=1,
        hidden_size=hidden_size,
        ffn_hidden_size=hidden_size,
        num_attention_heads=run.parallel.tensor_model_parallel_size,  # unused, but must divide
        activation_func=functional.gelu,
        add_bias_linear=True,
    )
