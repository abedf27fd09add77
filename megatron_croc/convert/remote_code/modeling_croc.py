"""Croc (arXiv 2410.14332) for inference: LLaVA with visual tokens of length 1.

Prompt pool and reconstruction head are of training only; a checkpoint may hold them all the same.
"""

from torch import Tensor
from torch.nn.functional import normalize
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .configuration_croc import CrocConfig

_TRAINING_ONLY = [r"^prompt_pool\.", r"^reconstruction_head\."]


class CrocMultiModalProjector(LlavaMultiModalProjector):
    """Linear, GELU, Linear, L2 norm."""

    def forward(self, image_features: Tensor) -> Tensor:
        """[..., vision width] -> [..., language width], each of length 1."""
        return normalize(super().forward(image_features), dim=-1, eps=1e-12)


class CrocModel(LlavaModel):
    """Tower, projector and language model, without the output layer."""

    config_class = CrocConfig
    _keys_to_ignore_on_load_unexpected = _TRAINING_ONLY

    def __init__(self, config: CrocConfig) -> None:
        """Build LLaVA, and put Croc's projector in its place."""
        super().__init__(config)
        self.multi_modal_projector = CrocMultiModalProjector(config)
        self.post_init()


class CrocForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model."""

    config_class = CrocConfig
    _keys_to_ignore_on_load_unexpected = _TRAINING_ONLY

    def __init__(self, config: CrocConfig) -> None:
        """Build LLaVA, and put Croc's model in its place."""
        super().__init__(config)
        self.model = CrocModel(config)
        self.post_init()
