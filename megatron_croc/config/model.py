"""Sizes and choices of the model: vision tower, language model, prompt pool, reconstruction."""

from dataclasses import dataclass, field
from typing import Literal

MaskType = Literal["causal", "prefix", "visual"]

AttentionBackend = Literal["auto", "flip", "flex", "dense", "fa4", "ffa"]


@dataclass(kw_only=True)
class VisionTowerConfig:
    """CLIP or SigLIP(2) vision transformer; Croc uses its second to last hidden state."""

    vision_model_type: Literal["clip", "siglip"] = "clip"
    """clip: class token, pre-layernorm, no patch bias. siglip: no class token, no pre-layernorm, a
    patch bias."""

    img_size: int = 336
    """Height and width of the (square) input image, pixels."""

    patch_dim: int = 14
    """Height and width of one patch, pixels."""

    vision_num_layers: int = 24
    """Layers of the published tower, including those after the selected one, which never run."""

    vision_hidden_size: int = 1024
    """Width of the vision tower."""

    vision_ffn_hidden_size: int = 4096
    """Width of the tower's feed-forward layers."""

    vision_num_attention_heads: int = 16
    """Attention heads of the tower."""

    vision_activation: Literal["quick_gelu", "gelu_tanh"] = "quick_gelu"
    """quick_gelu for OpenAI's CLIP, gelu_tanh for SigLIP."""

    vision_norm_epsilon: float = 1e-5
    """Epsilon of the tower's layer norms."""

    vision_select_layer: int = -2
    """Index of the hidden state used as visual features, as in Hugging Face's hidden_states."""

    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per-channel mean of pixels in [0, 1]; also the padding color of images."""

    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per-channel standard deviation of pixels in [0, 1]."""

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of one image, without the class token."""
        return (self.img_size // self.patch_dim) ** 2

    @property
    def covered_img_size(self) -> int:
        """Image size covered by whole patches, pixels: of SigLIP's 384, the last 6 are not read."""
        return self.img_size // self.patch_dim * self.patch_dim

    @property
    def num_active_layers(self) -> int:
        """Number of layers that run; hidden_states[-2] needs all but the last."""
        selected = self.vision_select_layer
        return selected if selected >= 0 else self.vision_num_layers + 1 + selected


@dataclass(kw_only=True)
class LanguageModelConfig:
    """Llama-style decoder: RMSNorm, SwiGLU, rotary positions; Qwen2.5 adds a QKV bias."""

    num_layers: int = 32
    """Transformer layers."""

    hidden_size: int = 4096
    """Width of the language model."""

    ffn_hidden_size: int = 11008
    """Width of the feed-forward layers."""

    num_attention_heads: int = 32
    """Query heads."""

    num_query_groups: int = 32
    """Key/value heads (equal to num_attention_heads: multi-head attention)."""

    kv_channels: int | None = None
    """Width of one head; None: hidden_size / num_attention_heads."""

    vocab_size: int = 32000
    """Rows of the embedding table: size of the tokenizer, padded to a multiple of the TP size."""

    max_position_embeddings: int = 4096
    """Longest sequence that the language model was trained for, tokens."""

    rotary_base: float = 10000.0
    """Base period of the rotary embedding (theta)."""

    rope_scaling_type: Literal["none", "linear", "llama3"] = "none"
    """Scaling of rotary positions beyond the original length."""

    rope_scaling_factor: float = 1.0
    """Scaling factor of `linear` and `llama3`."""

    norm_epsilon: float = 1e-5
    """Epsilon of the RMS norms."""

    add_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2.5)."""

    untie_embeddings_and_output_weights: bool = True
    """False: the output layer uses the embedding table (small Qwen2.5 models)."""

    init_method_std: float = 0.02
    """Standard deviation of initial weights."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(kw_only=True)
class PromptPoolConfig:
    """Learned tokens that replace most of an image's visual tokens."""

    pool_size: int = 2048
    """Number of pool tokens (P)."""

    pool_init: Literal["randn", "unit"] = "randn"
    """randn: as published (norm ~ sqrt(hidden_size)). unit: norm 1, like the visual tokens."""

    assign_mode: Literal["hungarian", "nearest"] = "hungarian"
    """hungarian: one-to-one, minimum total distance. nearest: argmin, as in the released Croc."""

    assign_backend: Literal["auto", "triton", "cpu", "scipy", "torch"] = "auto"
    """Solver of `hungarian`, all exact: triton (auto on a GPU that has it), cpu (auto elsewhere),
    plain scipy, or torch (readable, slow)."""

    overlap_assignment: bool = True
    """Match the next micro-batch while this one computes, if the vision tower is frozen. Keeps one
    more micro-batch of visual embeddings in memory; results are the same."""

    replace_ratio: float = 0.75
    """Share of an image's visual tokens that are replaced."""


@dataclass(kw_only=True)
class ReconstructionConfig:
    """Head that reconstructs the visual tokens, and its loss."""

    reconstruction_head: Literal["bert", "linear"] = "bert"
    """bert: positions + one BertLayer + linear (Croc). linear: one linear layer (ViCToR)."""

    reconstruction_loss_weight: float = 10.0
    """loss = text loss + weight * reconstruction loss."""

    smooth_l1_beta: float = 0.01
    """Difference at which SmoothL1 changes from quadratic to linear."""

    reconstruction_dropout: float = 0.1
    """Dropout of the `bert` head in training."""


@dataclass(kw_only=True)
class CrocModelConfig:
    """Composite model: vision tower, prompt pool, language model and reconstruction head."""

    vision_tower: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    prompt_pool: PromptPoolConfig = field(default_factory=PromptPoolConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    attention_mask_type: MaskType = "causal"
    """causal | prefix (bidirectional up to the first label) | visual (the same in each image)."""

    attention_backend: AttentionBackend = "auto"
    """Attention of the language model. flip: two causal flash calls. flex: FlexAttention. dense:
    full mask. auto: the fastest that runs on this device."""

    @property
    def num_replaced_tokens(self) -> int:
        """Replaced visual tokens of one image: N - floor(N * (1 - ratio))."""
        num_tokens = self.vision_tower.num_visual_tokens
        kept = int(num_tokens * (1.0 - self.prompt_pool.replace_ratio) + 1e-6)
        return num_tokens - kept
