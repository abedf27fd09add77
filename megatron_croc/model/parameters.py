"""Numbers of parameters of each part and pipeline stage, from the configuration alone.

`cut` parameters are split over the tensor-parallel ranks, `whole` parameters are on each of them.
Vision tower, projector and language model are tensor-parallel; pool and head are not, nor is a
tower whose images are shared out (`split_vision` images).
"""

from dataclasses import dataclass

from megatron_croc.config.model import (
    CrocModelConfig,
    LanguageModelConfig,
    ReconstructionConfig,
    VisionTowerConfig,
)
from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.config.parts import PARTS, Part


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A number of parameters, by how tensor parallelism treats them."""

    cut: int = 0
    """Split over the tensor-parallel ranks."""

    whole: int = 0
    """On every tensor-parallel rank."""

    @property
    def total(self) -> int:
        """Parameters of one copy of the model."""
        return self.cut + self.whole

    def on_rank(self, tensor_model_parallel_size: int) -> int:
        """Parameters on one tensor-parallel rank."""
        return self.cut // tensor_model_parallel_size + self.whole

    def __add__(self, other: "Parameters") -> "Parameters":
        """Sum of both."""
        return Parameters(cut=self.cut + other.cut, whole=self.whole + other.whole)

    def __mul__(self, times: int) -> "Parameters":
        """Parameters of `times` equal modules."""
        return Parameters(cut=self.cut * times, whole=self.whole * times)


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding table: the vocabulary, rounded up to a multiple of the TP size."""
    return -(-vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size


def vision_layer(config: VisionTowerConfig) -> Parameters:
    """One layer of the vision tower; every linear layer and norm has a bias."""
    h, f = config.vision_hidden_size, config.vision_ffn_hidden_size
    attention = Parameters(cut=4 * h * h + 3 * h, whole=h)
    feed_forward = Parameters(cut=2 * h * f + f, whole=h)
    return attention + feed_forward + Parameters(whole=4 * h)


def vision_tower(config: VisionTowerConfig) -> Parameters:
    """Patch and position embeddings and the active layers; unused last layers are not built."""
    h = config.vision_hidden_size
    embeddings = (3 * config.patch_dim**2 + config.num_visual_tokens) * h
    # CLIP: class token, its position, pre-layernorm. SigLIP: the bias of the patches.
    extra = 4 * h if config.vision_model_type == "clip" else h
    return Parameters(whole=embeddings + extra) + vision_layer(config) * config.num_active_layers


def projector(vision_hidden_size: int, hidden_size: int) -> Parameters:
    """mlp2x_gelu: two linear layers with biases."""
    h = hidden_size
    return Parameters(cut=vision_hidden_size * h + h + h * h, whole=h)


def decoder_layer(config: LanguageModelConfig) -> Parameters:
    """One layer of the language model."""
    h = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    qkv = queries + 2 * config.num_query_groups * config.head_dim
    bias = qkv if config.add_qkv_bias else 0
    return Parameters(
        cut=h * qkv + bias + queries * h + 3 * h * config.ffn_hidden_size, whole=2 * h
    )


def reconstruction_head(
    config: ReconstructionConfig, *, hidden_size: int, num_visual_tokens: int
) -> Parameters:
    """`linear`: h -> h. `bert`: positions and one BertLayer with a 4h feed-forward before it."""
    h = hidden_size
    linear = h * h + h
    if config.reconstruction_head == "linear":
        return Parameters(whole=linear)
    attention = 4 * (h * h + h)
    feed_forward = 2 * 4 * h * h + 4 * h + h
    norms = 4 * h
    return Parameters(whole=num_visual_tokens * h + attention + feed_forward + norms + linear)


def language_model_stages(
    config: LanguageModelConfig, parallel: ParallelConfig
) -> list[Parameters]:
    """Parameters of the language model on each pipeline stage."""
    rows = padded_vocab_size(config.vocab_size, parallel.tensor_model_parallel_size)
    table = Parameters(cut=rows * config.hidden_size)
    stages = [
        decoder_layer(config) * layers for layers in parallel.pipeline_layers(config.num_layers)
    ]
    stages[0] += table
    stages[-1] += Parameters(whole=config.hidden_size)  # the final norm
    # A tied output layer needs its own copy of the table on another stage than the embedding.
    if config.untie_embeddings_and_output_weights or len(stages) > 1:
        stages[-1] += table
    return stages


def stage_parameters(
    model: CrocModelConfig, parallel: ParallelConfig, *, reconstructs: bool
) -> list[dict[Part, Parameters]]:
    """Parameters of each part on each pipeline stage.

    Args:
        model: sizes.
        parallel: sizes of the parallel axes.
        reconstructs: prompt pool and reconstruction head are part of the model.
    """
    h = model.language_model.hidden_size
    stages: list[dict[Part, Parameters]] = [
        {"language_model": share} for share in language_model_stages(model.language_model, parallel)
    ]
    tower = vision_tower(model.vision_tower)
    is_cut = parallel.split_vision == "heads"
    stages[0]["vision_tower"] = tower if is_cut else Parameters(whole=tower.total)
    stages[0]["projector"] = projector(model.vision_tower.vision_hidden_size, h)
    if reconstructs:
        stages[0]["prompt_pool"] = Parameters(whole=model.prompt_pool.pool_size * h)
        stages[-1]["reconstruction_head"] = reconstruction_head(
            model.reconstruction,
            hidden_size=h,
            num_visual_tokens=model.vision_tower.num_visual_tokens,
        )
    return stages


def count_parameters(model: CrocModelConfig) -> dict[Part, int]:
    """Parameters of each part of the published model: no vocabulary padding, no copies."""
    (parts,) = stage_parameters(model, ParallelConfig(), reconstructs=True)
    return {part: parts[part].total for part in PARTS}
