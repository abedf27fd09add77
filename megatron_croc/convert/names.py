"""The name map between megatron-core and Hugging Face style checkpoints, as data.

One table for both directions. `{}` is the layer. Releases differ only in the prefixes of the parts,
see `Layout`.
"""

import re
from dataclasses import dataclass

from megatron_croc.config.model import CrocModelConfig
from megatron_croc.convert.tensors import Copy, GroupedQKV, Operation, Reshape, Rows, Stack


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Prefixes of the parts in a release."""

    language_model: str = "model."
    lm_head: str = "lm_head."
    projector: str = "model.mm_projector."
    projector_layers: tuple[str, str] = ("0", "2")
    """Names of the projector's two linear layers, under its prefix."""
    vision_tower: str = "model.vision_tower.vision_tower.vision_model."
    prompt_pool: str = "model.mask_token"
    bert_head: str = "transform_block."
    linear_head: str = "img_head."
    unused: tuple[str, ...] = ()
    """Patterns (matched from the start) of tensors in the release that are never used."""


CROC = Layout(unused=(r"model\.cross_attention\.",))
"""deepglint/Croc and LLaVA-1.5, as released."""

VICTOR = Layout(prompt_pool="model.token_pool", unused=(r"model\.pool_weight\.",))
"""deepglint/Victor, as released."""

EXPORT = Layout(
    language_model="model.language_model.",
    projector="model.multi_modal_projector.",
    projector_layers=("linear_1", "linear_2"),
    vision_tower="model.vision_tower.vision_model.",
    prompt_pool="prompt_pool.weight",
    bert_head="reconstruction_head.",
    linear_head="reconstruction_head.",
)
"""CrocForConditionalGeneration, our own export."""

SEPARATE = Layout(
    vision_tower="vision_model.",
    unused=(r"text_model\.", r"(text|visual)_projection\.", r"logit_(scale|bias)$"),
)
"""A language model and a separate tower (or a whole CLIP or SigLIP; its text model is unused)."""

_NEVER_RUN = (
    r".*rotary_emb\.inv_freq$",
    r".*embeddings\.position_ids$",
    r".*vision_model\.post_layernorm\.",
    r".*vision_model\.head\.",  # SigLIP's pooling
)
"""Patterns of tensors that this model does not use: old buffers, heads of whole models."""


def is_ignored(name: str, model: CrocModelConfig, layout: Layout) -> bool:
    """Return True if a Hugging Face tensor may be unused; all others must have a rule."""
    if any(re.match(pattern, name) for pattern in (*_NEVER_RUN, *layout.unused)):
        return True
    if name == layout.lm_head + "weight":
        return not model.language_model.untie_embeddings_and_output_weights
    layer = re.match(re.escape(layout.vision_tower) + r"encoder\.layers\.(\d+)\.", name)
    return layer is not None and (
        model.vision_tower.num_active_layers <= int(layer[1]) < model.vision_tower.vision_num_layers
    )


_COPY = Copy()


@dataclass(frozen=True)
class Rule:
    """One megatron tensor and its Hugging Face tensors."""

    megatron: str
    """Global key, without the layer."""

    huggingface: tuple[str, ...]
    """Names in the order of the arguments of `operation`."""

    operation: Operation = _COPY

    @property
    def has_layers(self) -> bool:
        """True if the layers of a stack share the key."""
        return "{}" in self.huggingface[0]

    def names(self, layer: int | None) -> tuple[str, ...]:
        """Return the Hugging Face names of one layer."""
        return tuple(name.format(layer) for name in self.huggingface)


def build_rules(model: CrocModelConfig, layout: Layout) -> dict[str, Rule]:
    """Build all rules of a model, keyed by megatron key."""
    rules = [
        *_language_model(model, layout),
        *_vision_tower(model, layout),
        *_linear("projector.encoder.linear_fc1", layout.projector + layout.projector_layers[0]),
        *_linear("projector.encoder.linear_fc2", layout.projector + layout.projector_layers[1]),
        Rule("prompt_pool.weight", (layout.prompt_pool,)),
        *_reconstruction_head(model, layout),
    ]
    return {rule.megatron: rule for rule in rules}


def _linear(megatron: str, huggingface: str) -> list[Rule]:
    """Build the rules of weight and bias of a module."""
    return [Rule(f"{megatron}.{kind}", (f"{huggingface}.{kind}",)) for kind in ("weight", "bias")]


def _language_model(model: CrocModelConfig, layout: Layout) -> list[Rule]:
    llm = model.language_model
    qkv = GroupedQKV(
        num_query_groups=llm.num_query_groups,
        queries_per_group=llm.num_attention_heads // llm.num_query_groups,
        head_dim=llm.head_dim,
    )
    ours, theirs = "language_model.decoder.layers.", layout.language_model + "layers.{}."
    attention, mlp = ours + "self_attention.", ours + "mlp."

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv")

    table = Rows(llm.vocab_size)
    embedding = layout.language_model + "embed_tokens.weight"
    rules = [
        Rule("language_model.embedding.word_embeddings.weight", (embedding,), table),
        Rule(attention + "linear_qkv.layer_norm_weight", (theirs + "input_layernorm.weight",)),
        Rule(attention + "linear_qkv.weight", projections("weight"), qkv),
        Rule(attention + "linear_proj.weight", (theirs + "self_attn.o_proj.weight",)),
        Rule(mlp + "linear_fc1.layer_norm_weight", (theirs + "post_attention_layernorm.weight",)),
        Rule(
            mlp + "linear_fc1.weight",
            (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
            Stack(),
        ),
        Rule(mlp + "linear_fc2.weight", (theirs + "mlp.down_proj.weight",)),
        Rule(
            "language_model.decoder.final_layernorm.weight",
            (layout.language_model + "norm.weight",),
        ),
    ]
    if llm.add_qkv_bias:
        rules.append(Rule(attention + "linear_qkv.bias", projections("bias"), qkv))
    # A tied model has no lm_head tensor: its output layer is the embedding table.
    tied = not llm.untie_embeddings_and_output_weights
    output = embedding if tied else layout.lm_head + "weight"
    rules.append(Rule("language_model.output_layer.weight", (output,), table))
    return rules


def _vision_tower(model: CrocModelConfig, layout: Layout) -> list[Rule]:
    vision = model.vision_tower
    qkv = GroupedQKV(
        num_query_groups=vision.vision_num_attention_heads,
        queries_per_group=1,
        head_dim=vision.vision_hidden_size // vision.vision_num_attention_heads,
    )
    ours, theirs = "vision_tower.vit.", layout.vision_tower
    layer, their_layer = ours + "decoder.layers.", theirs + "encoder.layers.{}."
    rules = [
        Rule(ours + "conv1.weight", (theirs + "embeddings.patch_embedding.weight",)),
        Rule(
            ours + "position_embeddings.weight",
            (theirs + "embeddings.position_embedding.weight",),
        ),
    ]
    if vision.vision_model_type == "clip":
        width = vision.vision_hidden_size
        rules.append(
            Rule(
                ours + "class_token",
                (theirs + "embeddings.class_embedding",),
                Reshape((1, 1, width), (width,)),
            )
        )
        rules += _linear(ours + "ln_pre", theirs + "pre_layrnorm")  # the release's spelling
    else:
        rules.append(Rule(ours + "conv1.bias", (theirs + "embeddings.patch_embedding.bias",)))
    for kind in ("weight", "bias"):
        names = tuple(f"{their_layer}self_attn.{name}_proj.{kind}" for name in "qkv")
        rules += [
            Rule(f"{layer}self_attention.linear_qkv.{kind}", names, qkv),
            Rule(
                f"{layer}self_attention.linear_qkv.layer_norm_{kind}",
                (f"{their_layer}layer_norm1.{kind}",),
            ),
            Rule(f"{layer}mlp.linear_fc1.layer_norm_{kind}", (f"{their_layer}layer_norm2.{kind}",)),
        ]
    rules += _linear(layer + "self_attention.linear_proj", their_layer + "self_attn.out_proj")
    rules += _linear(layer + "mlp.linear_fc1", their_layer + "mlp.fc1")
    rules += _linear(layer + "mlp.linear_fc2", their_layer + "mlp.fc2")
    return rules


_BERT_HEAD = {
    "query": "layers.0.attention.self.query",
    "key": "layers.0.attention.self.key",
    "value": "layers.0.attention.self.value",
    "attention_output": "layers.0.attention.output.dense",
    "attention_norm": "layers.0.attention.output.LayerNorm",
    "intermediate": "layers.0.intermediate.dense",
    "output": "layers.0.output.dense",
    "output_norm": "layers.0.output.LayerNorm",
    "resize": "resize",
}


def _reconstruction_head(model: CrocModelConfig, layout: Layout) -> list[Rule]:
    ours = "reconstruction_head."
    if model.reconstruction.reconstruction_head == "linear":
        return _linear(ours + "resize", layout.linear_head.rstrip("."))
    rules = [
        Rule(
            ours + "position_embeddings.weight",
            (layout.bert_head + "position_embeddings.weight",),
            Rows(model.vision_tower.num_visual_tokens),
        )
    ]
    for mine, theirs in _BERT_HEAD.items():
        rules += _linear(ours + mine, layout.bert_head + theirs)
    return rules
