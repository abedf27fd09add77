"""Floating-point operations of training, the useful work of MFU.

Counted: every matrix product of vision tower, projector, matching, language model and
reconstruction head; attention by its visible query-key pairs; logits of labelled positions;
forward, and backward as far as the trained parts need it. Not counted: padding, recomputation,
elementwise work, optimizer. A multiply and an add are two operations. Numbers only: no torch, so it
can run before a job does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_croc.config.model import ReconstructionConfig, VisionTowerConfig
from megatron_croc.config.parts import Part, trained_parts
from megatron_croc.config.run import RunConfig

Flops = dict[str, float]
"""Operations of each part, and of `matching`."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Size of some samples: of one micro-batch, or of a whole step."""

    num_tokens: int
    """Tokens the language model reads, visual tokens included, padding not."""

    num_pairs: int
    """Visible query-key pairs, summed over the samples."""

    num_labels: int
    """Labelled positions, the only ones whose logits are computed."""

    num_images: int
    """Images, each seen once by the vision tower."""

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        *,
        num_labels: int,
        num_images: int,
        span_lengths: Sequence[int] = (),
    ) -> "Work":
        """Samples of these lengths; `span_lengths` are those of their bidirectional spans."""
        return cls(
            num_tokens=sum(lengths),
            num_pairs=visible_pairs(lengths, span_lengths),
            num_labels=num_labels,
            num_images=num_images,
        )

    def __add__(self, other: "Work") -> "Work":
        """Sum of both."""
        sums = {field.name: getattr(self, field.name) for field in fields(self)}
        return Work(**{name: size + getattr(other, name) for name, size in sums.items()})


def visible_pairs(lengths: Sequence[int], span_lengths: Sequence[int] = ()) -> int:
    """Number of query-key pairs of causal samples, plus the upper triangle of every span."""
    causal = sum(s * (s + 1) // 2 for s in lengths)
    return causal + sum(n * (n - 1) // 2 for n in span_lengths)


def count_flops(run: RunConfig, work: Work) -> Flops:
    """Operations of training on `work`: forward and backward, all ranks together.

    Args:
        run: shapes, stage, and which parts are frozen.
        work: what the samples hold.

    Returns:
        operations of each part that exists in this stage; sum them for the total.
    """
    trained = trained_parts(run.training, reconstructs=run.reconstructs)
    # A part must pass gradients on to its input when something before it is trained.
    vision_trained = "vision_tower" in trained
    inputs_trained = vision_trained or bool({"projector", "prompt_pool"} & trained)
    flops = {
        "vision_tower": work.num_images * _vision_tower(run, trained),
        "projector": work.num_images * _projector(run, trained),
        "language_model": _language_model(run, work, trained, needs_input_grad=inputs_trained),
    }
    if run.reconstructs:
        flops["matching"] = work.num_images * matching_flops(run)
        flops["reconstruction_head"] = (
            work.num_images
            * 3
            * _reconstruction_head(
                run.model.reconstruction,
                num_tokens=run.model.vision_tower.num_visual_tokens,
                hidden_size=run.model.language_model.hidden_size,
            )
        )
    return flops


def _linear(forward: float, *, trained: bool, needs_input_grad: bool) -> float:
    """Forward, weight gradient and input gradient of a linear layer cost the same each."""
    return forward * (1 + trained + needs_input_grad)


def _vision_tower(run: RunConfig, trained: frozenset[Part]) -> float:
    config = run.model.vision_tower
    is_trained = "vision_tower" in trained
    patches, layers = _vision_forward(config)
    return _linear(patches, trained=is_trained, needs_input_grad=False) + _linear(
        layers, trained=is_trained, needs_input_grad=is_trained
    )


def _vision_forward(config: VisionTowerConfig) -> tuple[float, float]:
    """Forward operations of one image: patch embedding, and all layers that run."""
    h, num_patches = config.vision_hidden_size, config.num_visual_tokens
    num_tokens = num_patches + (config.vision_model_type == "clip")  # the class token
    patches = 2 * num_patches * 3 * config.patch_dim**2 * h
    linear = 2 * num_tokens * (4 * h * h + 2 * h * config.vision_ffn_hidden_size)
    attention = 4 * num_tokens**2 * h
    return patches, config.num_active_layers * (linear + attention)


def _projector(run: RunConfig, trained: frozenset[Part]) -> float:
    vision, h = run.model.vision_tower, run.model.language_model.hidden_size
    is_trained, vision_trained = "projector" in trained, "vision_tower" in trained
    first = 2 * vision.num_visual_tokens * vision.vision_hidden_size * h
    second = 2 * vision.num_visual_tokens * h * h
    return _linear(first, trained=is_trained, needs_input_grad=vision_trained) + _linear(
        second, trained=is_trained, needs_input_grad=is_trained or vision_trained
    )


def _language_model(
    run: RunConfig, work: Work, trained: frozenset[Part], *, needs_input_grad: bool
) -> float:
    config = run.model.language_model
    is_trained = "language_model" in trained
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_query_groups * config.head_dim
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.ffn_hidden_size)
    linear = 2 * work.num_tokens * weights * config.num_layers
    logits = 2 * work.num_labels * config.hidden_size * config.vocab_size
    attention = 4 * work.num_pairs * queries * config.num_layers
    has_backward = is_trained or needs_input_grad
    # Attention has no weights: its backward is two products for each of the forward's.
    return _linear(
        linear + logits, trained=is_trained, needs_input_grad=has_backward
    ) + attention * (3 if has_backward else 1)


def _reconstruction_head(
    config: ReconstructionConfig, *, num_tokens: int, hidden_size: int
) -> float:
    """Forward operations of one image."""
    weights, attention = hidden_size**2, 0.0
    if config.reconstruction_head == "bert":
        weights += (4 + 8) * hidden_size**2  # q, k, v, output; a feed-forward of 4h
        attention = 4.0 * num_tokens**2 * hidden_size
    return 2 * num_tokens * weights + attention


def matching_flops(run: RunConfig) -> float:
    """Distances of one image's replaced tokens to the pool; matching itself has no products."""
    model = run.model
    num_pairs = model.num_replaced_tokens * model.prompt_pool.pool_size
    return 2.0 * num_pairs * model.language_model.hidden_size
