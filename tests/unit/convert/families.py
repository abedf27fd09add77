"""Tiny language models and towers as transformers saves them, one of each family."""

from pathlib import Path

from tests.unit.model.huggingface import randomise

VOCABULARY = 127
"""Not a multiple of 2: padded at TP 2."""

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)

FAMILIES = {
    "vicuna + clip": ("llama", dict(num_key_value_heads=4), "clip"),
    "llama gqa, linear rope, tied + siglip": (
        "llama",
        dict(
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
            tie_word_embeddings=True,
        ),
        "siglip",
    ),
    "llama3 rope + clip": ("llama", dict(rope_parameters=LLAMA3), "clip"),
    "qwen2 + siglip": (
        "qwen2",
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        "siglip",
    ),
    "qwen2 tied + clip": ("qwen2", dict(tie_word_embeddings=True), "clip"),
}


def save_family(folder: Path, name: str, **arguments: object) -> tuple[Path, Path]:
    """Language model and tower of a family with random weights; their directories."""
    import transformers

    kind, changes, tower = FAMILIES[name]
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[kind]
    sizes = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    llm = model(config(**(sizes | changes)))
    randomise(llm)
    llm.save_pretrained(folder / "llm", **arguments)
    vision, encoder = {
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
    }[tower]
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    vit = encoder(vision(**sizes))
    randomise(vit, seed=1)
    vit.save_pretrained(folder / "vision")
    return folder / "llm", folder / "vision"


def read_all(folder: Path) -> dict:
    """Every tensor of a directory."""
    from megatron_croc.convert.tensor_files import LazyTensors, open_tensors

    return dict(LazyTensors(open_tensors(folder)))
