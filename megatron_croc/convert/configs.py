"""Convert the config.json of a Hugging Face directory to our model configuration.

llama, qwen2                              a language model
clip, clip_vision_model, siglip, ...      a vision tower
croc_llama, llava_llama, llava_qwen       a release: the language model's sizes, mm_* for the rest
croc                                      our own export

Settings that change the computation and are not supported are refused by name.
"""

from pathlib import Path
from typing import Any

from megatron_croc.config.base import apply_changes, changes_from_tree, raise_faults
from megatron_croc.config.data import DataConfig
from megatron_croc.config.model import CrocModelConfig, LanguageModelConfig, VisionTowerConfig
from megatron_croc.config.run import RunConfig
from megatron_croc.convert.tensor_files import read_json
from megatron_croc.errors import CheckpointError
from megatron_croc.recipes import get_recipe

LANGUAGE_MODELS = {
    "llama": "llama",
    "qwen2": "qwen2",
    "croc_llama": "llama",
    "llava_llama": "llama",
    "llava_qwen": "qwen2",
}
"""model_type -> the family of its language model."""

VISION_TOWERS = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}
"""model_type -> the family of its vision tower."""

RELEASES = ("croc_llama", "llava_llama", "llava_qwen")
"""model_type of whole models in the layout of LLaVA's code."""

EXPORT = "croc"
"""model_type of our own export."""

SETTINGS = "croc_settings"
"""Key of our model settings in an export's config.json."""

CONVERSATION = "croc_conversation"
"""Key of the settings of prompts and images (fields of DataConfig) in an export's config.json."""

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}

# Defaults that transformers leaves out of config.json.
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "siglip": dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
}
_VISION_SIZES = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    num_channels=3,
)
_POSITIONS = {"llama": 2048, "qwen2": 32768}

_KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": "croc_7b/finetune",
    "siglip2-so400m-patch14-384": "victor_7b/finetune",
}
"""Towers that releases only name, and a recipe that uses each."""


def read_language_model(folder: Path) -> LanguageModelConfig:
    """Read the configuration of a language model's directory.

    Raises:
        CheckpointError: another architecture, or a setting that is not supported.
    """
    path = folder / "config.json"
    return parse_language_model(read_json(path), path)


def parse_language_model(config: dict[str, Any], path: Path) -> LanguageModelConfig:
    """Convert a llama or qwen2 config.

    Raises:
        CheckpointError: another architecture, or a setting that is not supported.
    """
    family = _family(config, LANGUAGE_MODELS, path)
    _require(config, path, hidden_act=("silu", "silu"), mlp_bias=(False, False))
    _require(config, path, use_sliding_window=(False, False))
    if family == "llama":
        _require(config, path, attention_bias=(False, False), pretraining_tp=(1, 1))
    hidden_size = _number(config, "hidden_size", path)
    heads = _number(config, "num_attention_heads", path)
    head_dim = config.get("head_dim") or hidden_size // heads
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"{path}: rope scaling {kind} is not supported")
    if kind == "llama3":
        _require(
            scaling,
            path,
            low_freq_factor=(1.0, 1.0),
            high_freq_factor=(4.0, 4.0),
            original_max_position_embeddings=(8192, 8192),
        )
    return LanguageModelConfig(
        num_layers=_number(config, "num_hidden_layers", path),
        hidden_size=hidden_size,
        ffn_hidden_size=_number(config, "intermediate_size", path),
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=None if head_dim * heads == hidden_size else head_dim,
        vocab_size=_number(config, "vocab_size", path),
        max_position_embeddings=int(config.get("max_position_embeddings", _POSITIONS[family])),
        rotary_base=float(config.get("rope_theta", rope.get("rope_theta", 10000.0))),
        rope_scaling_type="none" if kind == "default" else kind,
        rope_scaling_factor=1.0 if kind == "default" else float(scaling["factor"]),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        add_qkv_bias=family == "qwen2",
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        init_method_std=float(config.get("initializer_range", 0.02)),
    )


def read_vision_tower(folder: Path) -> VisionTowerConfig:
    """Read the configuration of a tower's directory, with the pixel statistics beside it."""
    path = folder / "config.json"
    vision = parse_vision_tower(read_json(path), path)
    processor = folder / "preprocessor_config.json"
    if processor.exists():
        statistics = read_json(processor)
        if "image_mean" in statistics and "image_std" in statistics:
            vision.image_mean = tuple(statistics["image_mean"])
            vision.image_std = tuple(statistics["image_std"])
    return vision


def parse_vision_tower(config: dict[str, Any], path: Path) -> VisionTowerConfig:
    """Convert a CLIP or SigLIP config, of the tower alone or of tower and text model.

    Raises:
        CheckpointError: another architecture, or a setting that is not supported.
    """
    family = _family(config, VISION_TOWERS, path)
    config = {**_VISION_SIZES, **_VISION_DEFAULTS[family], **config.get("vision_config", config)}
    _require(config, path, num_channels=(3, 3))
    if config["hidden_act"] not in _ACTIVATIONS:
        raise CheckpointError(
            f"{path}: hidden_act {config['hidden_act']} is not supported; "
            f"only {', '.join(_ACTIVATIONS)}"
        )
    vision = VisionTowerConfig(
        vision_model_type="clip" if family == "clip" else "siglip",
        img_size=_number(config, "image_size", path),
        patch_dim=_number(config, "patch_size", path),
        vision_num_layers=_number(config, "num_hidden_layers", path),
        vision_hidden_size=_number(config, "hidden_size", path),
        vision_ffn_hidden_size=_number(config, "intermediate_size", path),
        vision_num_attention_heads=_number(config, "num_attention_heads", path),
        vision_activation="quick_gelu" if config["hidden_act"] == "quick_gelu" else "gelu_tanh",
        vision_norm_epsilon=float(config["layer_norm_eps"]),
    )
    if family == "siglip":
        vision.image_mean = vision.image_std = (0.5, 0.5, 0.5)
    return vision


def read_release(folder: Path, vision_folder: Path | None) -> CrocModelConfig:
    """Read the configuration of a whole model in the layout of LLaVA's code.

    Args:
        folder: the release.
        vision_folder: the vision tower's directory. A release only names its tower, so this is
            needed unless the name is known or the configuration has `vision_config`.

    Raises:
        CheckpointError: names what is not supported or missing.
    """
    path = folder / "config.json"
    config = read_json(path)
    _require(config, path, mm_projector_type=("mlp2x_gelu", "linear"))
    _require(config, path, mm_vision_select_feature=("patch", "patch"))
    model = CrocModelConfig(language_model=parse_language_model(config, path))
    name = str(config.get("mm_vision_tower", ""))
    known = [recipe for tower, recipe in _KNOWN_TOWERS.items() if name.rstrip("/").endswith(tower)]
    if vision_folder is not None:
        model.vision_tower = read_vision_tower(vision_folder)
    elif "vision_config" in config:
        model.vision_tower = parse_vision_tower(config["vision_config"], path)
    elif known:
        model.vision_tower = get_recipe(known[0]).model.vision_tower
    else:
        raise CheckpointError(
            f"{path}: mm_vision_tower {name!r} is not known: "
            "add --vision DIR to croc convert import"
        )
    model.vision_tower.vision_select_layer = int(config.get("mm_vision_select_layer", -2))
    return model


def read_export(folder: Path) -> CrocModelConfig:
    """Read the model settings of our own export from its config.json."""
    return _read_settings(folder, SETTINGS, "model").model


def read_conversation(folder: Path) -> DataConfig:
    """Read template, tokenizer type and image handling of an export; other fields are defaults."""
    return _read_settings(folder, CONVERSATION, "data").data


def _read_settings(folder: Path, key: str, section: str) -> RunConfig:
    path = folder / "config.json"
    tree = read_json(path).get(key)
    run, faults = RunConfig(), []
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: has no {key}; export the checkpoint again")
    apply_changes(run, changes_from_tree(RunConfig, {section: tree}, faults, source=str(path)))
    raise_faults(faults)
    return run


def _family(config: dict[str, Any], known: dict[str, str], path: Path) -> str:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        names = ", ".join(map(str, config.get("architectures") or ["not named"]))
        raise CheckpointError(
            f"{path}: architecture {names} (model_type {kind}) is not known here; "
            f"known are {', '.join(known)}"
        )
    return known[kind]


def _number(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{path}: {key} is {value!r}, a positive number is needed")
    return value


def _require(config: dict[str, Any], path: Path, **settings: tuple[Any, Any]) -> None:
    """Check settings, given as (required value, value if absent)."""
    for key, (needed, default) in settings.items():
        value = config.get(key, default)
        if value is not None and value != needed:
            raise CheckpointError(f"{path}: {key} {value!r} is not supported, only {needed!r}")
