"""Convert our configuration to config.json and processor configs, for transformers >= 4.57."""

from typing import Any

import torch

from megatron_croc.config.base import to_tree
from megatron_croc.config.data import DataConfig
from megatron_croc.config.model import CrocModelConfig, LanguageModelConfig, VisionTowerConfig
from megatron_croc.convert.configs import CONVERSATION, EXPORT, SETTINGS

IMAGE_TOKEN = "<image>"
"""Mark of the image in a prompt; the processor repeats it once per visual token."""

PROJECTOR_ACTIVATION = "gelu_unit_length"
"""Activation named in config.json: GELU, and unit length of the projected tokens.

LLaVA cannot compute it: without the norm its answers are wrong, with no message. Every LLaVA (of
transformers, vLLM, SGLang) looks its activation up by this name, and stops as it knows none.
"""

_CONVERSATION_FIELDS = ("tokenizer_type", "conversation_template", "image_aspect_ratio")

_ROWS = 64
"""Divisor of the rows of a vocabulary table that grows for IMAGE_TOKEN."""


def table_rows(model: CrocModelConfig, image_token_id: int) -> int:
    """Compute the rows of the exported embedding table, which also needs a row for IMAGE_TOKEN."""
    rows = model.language_model.vocab_size
    return rows if image_token_id < rows else -(-(image_token_id + 1) // _ROWS) * _ROWS


def croc_config(
    model: CrocModelConfig, data: DataConfig, dtype: torch.dtype, image_token_id: int
) -> dict[str, Any]:
    """Build the config.json of the default export, with remote code and L2 norm.

    The tower ends at the selected layer, so `vision_feature_layer` is -1, the last one.
    """
    vision = model.vision_tower
    text = {
        **language_model_config(model.language_model),
        "vocab_size": table_rows(model, image_token_id),
    }
    return {
        "architectures": ["CrocForConditionalGeneration"],
        "model_type": EXPORT,
        "auto_map": {
            "AutoConfig": "configuration_croc.CrocConfig",
            "AutoModel": "modeling_croc.CrocModel",
            "AutoModelForImageTextToText": "modeling_croc.CrocForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_croc.CrocForConditionalGeneration",
        },
        "text_config": text,
        "vision_config": vision_config(vision, vision.num_active_layers),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": _select_strategy(vision),
        "image_token_index": image_token_id,
        "image_seq_length": vision.num_visual_tokens,
        "projector_hidden_act": PROJECTOR_ACTIVATION,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": _name(dtype),
        SETTINGS: to_tree(model),
        CONVERSATION: {name: getattr(data, name) for name in _CONVERSATION_FIELDS},
    }


def release_config(model: CrocModelConfig, dtype: torch.dtype, tower: str) -> dict[str, Any]:
    """Build the config.json in the layout of the released Croc (llama) and ViCToR (qwen2)."""
    llm = language_model_config(model.language_model)
    is_qwen, vision = llm["model_type"] == "qwen2", model.vision_tower
    return {
        **llm,
        "architectures": ["LlavaQwenForCausalLM" if is_qwen else "CrocLlamaForCausalLM"],
        "model_type": "llava_qwen" if is_qwen else "croc_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.vision_hidden_size,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": vision.vision_select_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
        "vision_config": vision_config(vision, vision.vision_num_layers),
        "torch_dtype": _name(dtype),
        "use_cache": True,
    }


def language_model_config(llm: LanguageModelConfig) -> dict[str, Any]:
    """Build a llama or qwen2 config; transformers 4 and 5 both read its `rope_theta`."""
    scaling: dict[str, Any] | None = None
    if llm.rope_scaling_type != "none":
        scaling = {"rope_type": llm.rope_scaling_type, "factor": llm.rope_scaling_factor}
    if llm.rope_scaling_type == "llama3":
        scaling = {
            **(scaling or {}),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config: dict[str, Any] = {
        "model_type": "qwen2" if llm.add_qkv_bias else "llama",
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.ffn_hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_query_groups,
        "hidden_act": "silu",
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "rope_theta": llm.rotary_base,
        "rope_scaling": scaling,
        "rms_norm_eps": llm.norm_epsilon,
        "initializer_range": llm.init_method_std,
        "tie_word_embeddings": not llm.untie_embeddings_and_output_weights,
    }
    if llm.kv_channels is not None:
        config["head_dim"] = llm.kv_channels
    if not llm.add_qkv_bias:
        config |= {"attention_bias": False, "mlp_bias": False}
    return config


def vision_config(vision: VisionTowerConfig, num_layers: int) -> dict[str, Any]:
    """Build a clip_vision_model or siglip_vision_model config."""
    is_clip = vision.vision_model_type == "clip"
    config = {
        "model_type": "clip_vision_model" if is_clip else "siglip_vision_model",
        "hidden_size": vision.vision_hidden_size,
        "intermediate_size": vision.vision_ffn_hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": vision.vision_num_attention_heads,
        "image_size": vision.img_size,
        "patch_size": vision.patch_dim,
        "num_channels": 3,
        "hidden_act": "quick_gelu"
        if vision.vision_activation == "quick_gelu"
        else "gelu_pytorch_tanh",
        "layer_norm_eps": vision.vision_norm_epsilon,
        "attention_dropout": 0.0,
    }
    return config if is_clip else {**config, "vision_use_head": False}


def processor_configs(vision: VisionTowerConfig, data: DataConfig) -> dict[str, dict[str, Any]]:
    """Build the configs of LLaVA's processor, file name -> content; it pads if training did."""
    size = vision.img_size
    image = {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": data.image_aspect_ratio == "pad",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_dim,
        "num_additional_image_tokens": 1 if vision.vision_model_type == "clip" else 0,
        "vision_feature_select_strategy": _select_strategy(vision),
    }
    return {"preprocessor_config.json": image, "processor_config.json": processor}


def _select_strategy(vision: VisionTowerConfig) -> str:
    """Return the feature selection: `default` drops CLIP's class token."""
    return "default" if vision.vision_model_type == "clip" else "full"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
