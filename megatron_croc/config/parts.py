"""Parts of the model, and which of them a run trains."""

from collections.abc import Mapping
from typing import Literal, get_args

from megatron_croc.config.training import TrainingConfig

Part = Literal["vision_tower", "projector", "prompt_pool", "language_model", "reconstruction_head"]
PARTS: tuple[Part, ...] = get_args(Part)


def trained_parts(training: TrainingConfig, *, reconstructs: bool) -> frozenset[Part]:
    """Parts of the model whose weights are trained."""
    trained: Mapping[Part, bool] = {
        "vision_tower": not training.freeze_ViT,
        "projector": not training.freeze_projector,
        "prompt_pool": reconstructs,
        "language_model": not training.freeze_LM,
        "reconstruction_head": reconstructs,
    }
    return frozenset(part for part, is_trained in trained.items() if is_trained)
