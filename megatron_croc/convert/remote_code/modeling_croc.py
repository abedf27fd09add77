"""Croc (arXiv 2410.14332) for inference: LLaVA with visual tokens of length 1.

Runs on transformers 4.57 and later. The parts are built here and not by LLaVA's constructors: they
refuse the projector's activation, which keeps them from computing something else.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from .configuration_croc import CrocConfig

_TRAINING_ONLY = [r"^prompt_pool\.", r"^reconstruction_head\."]
_ACTIVATION = "gelu_unit_length"
_LAYERS = ["LlamaDecoderLayer", "Qwen2DecoderLayer", "CLIPEncoderLayer", "SiglipEncoderLayer"]


class CrocMultiModalProjector(nn.Module):
    """Linear, GELU, Linear, L2 norm."""

    def __init__(self, config: CrocConfig) -> None:
        """Build the layers, under LLaVA's names; ValueError for another activation."""
        super().__init__()
        if config.projector_hidden_act != _ACTIVATION:
            raise ValueError(
                f"projector_hidden_act is {config.projector_hidden_act!r}, not {_ACTIVATION!r}: "
                "export the checkpoint again"
            )
        vision: Any = config.vision_config
        text: Any = config.text_config
        inner, outer = vision.hidden_size, text.hidden_size
        self.linear_1 = nn.Linear(inner, outer, bias=config.multimodal_projector_bias)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(outer, outer, bias=config.multimodal_projector_bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """[..., vision width] -> [..., language width], each of length 1."""
        projected = self.linear_2(self.act(self.linear_1(image_features)))
        return normalize(projected, dim=-1, eps=1e-12)


class CrocModel(LlavaModel):
    """Tower, projector and language model, without the output layer."""

    config_class = CrocConfig
    base_model_prefix = "model"
    _no_split_modules = _LAYERS
    _checkpoint_conversion_mapping = {}  # noqa: RUF012  (4.57: the names are those of the files)
    # The output layer is in the files too, beside parts of training.
    _keys_to_ignore_on_load_unexpected = [*_TRAINING_ONLY, r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: CrocConfig) -> None:
        """Build the parts."""
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = CrocMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class CrocForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model."""

    config_class = CrocConfig
    base_model_prefix = "model"
    _no_split_modules = _LAYERS
    _checkpoint_conversion_mapping = {}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = _TRAINING_ONLY

    def __init__(self, config: CrocConfig) -> None:
        """Build Croc's model and the output layer."""
        LlavaPreTrainedModel.__init__(self, config)
        self.model = CrocModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
