"""Module specs of megatron-core's transformer layers, with and without Transformer Engine.

Transformer Engine fuses each norm with the linear layer after it; megatron-core has them as
separate modules. The key map gives both the same names in a checkpoint, so both can load it.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_croc.model.core_attention import FullAttention, MixedMaskAttention
from megatron_croc.model.norm import Norm
from megatron_croc.model.transformer_engine import Implementation, linear_modules

_TE_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def mlp_submodules() -> MLPSubmodules:
    """Spec of column-parallel linear layer, activation, row-parallel linear layer."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _layer_spec(
    core_attention: type, attn_mask_type: AttnMaskType, implementation: Implementation
) -> ModuleSpec:
    if implementation == "te":
        return _te_layer_spec(core_attention, attn_mask_type)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp_submodules()),
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            sharded_state_dict_keys_map=_TE_KEYS,
        ),
    )


def _te_layer_spec(core_attention: type, attn_mask_type: AttnMaskType) -> ModuleSpec:
    modules = linear_modules()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.norm_column,
                    core_attention=core_attention,
                    linear_proj=modules.row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=modules.norm_column, linear_fc2=modules.row),
            ),
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
        ),
    )


def language_model_spec(
    num_layers: int, implementation: Implementation = "local"
) -> TransformerBlockSubmodules:
    """Spec of a decoder: `num_layers` layers (of this stage) under the mixed mask, final norm."""
    layer = _layer_spec(MixedMaskAttention, AttnMaskType.causal, implementation)
    # megatron builds an instance from the class, but its annotation allows instances only
    norm: Any = linear_modules().norm if implementation == "te" else Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def vision_tower_spec(
    num_layers: int, implementation: Implementation = "local"
) -> TransformerBlockSubmodules:
    """Spec of an encoder: `num_layers` layers with full attention, no final norm."""
    layer = _layer_spec(FullAttention, AttnMaskType.no_mask, implementation)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=None)
