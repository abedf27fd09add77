"""Croc as a model of vLLM: vLLM's LLaVA, with visual tokens of length 1.

Imported by vLLM only, through vllm_plugin.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor
from vllm.config import VllmConfig  # type: ignore[import-not-found]
from vllm.model_executor.models.llava import (  # type: ignore[import-not-found]
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # type: ignore[import-not-found]


class CrocProcessingInfo(LlavaProcessingInfo):
    """LLaVA's processor with training's pixels."""

    def get_hf_processor(self, **options: Any) -> Any:
        """Return the processor; it resizes with PIL, as training does, and not with torchvision."""
        processor = super().get_hf_processor(**options)
        if not type(processor.image_processor).__name__.endswith("Pil"):
            processor.image_processor = AutoImageProcessor.from_pretrained(
                self.ctx.model_config.model, backend="pil", local_files_only=True
            )
        return processor


class CrocMultiModalProcessor(LlavaMultiModalProcessor):
    """LLaVA's processing of prompts with images, which also refuses marks without an image."""

    def apply(self, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Put the visual tokens into a prompt; ValueError if it has more marks than images."""
        result = super().apply(inputs, *arguments, **options)
        mark = self.info.get_hf_config().image_token_index
        placed = sum(r.length for ranges in result["mm_placeholders"].values() for r in ranges)
        extra = result["prompt_token_ids"].count(mark) - placed
        if extra:
            raise ValueError(
                f"the prompt has {extra} <image> mark(s) without an image: give an image for "
                "each, or leave the mark out"
            )
        return result


@MULTIMODAL_REGISTRY.register_processor(
    CrocMultiModalProcessor, info=CrocProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class CrocForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with Croc's projector; rows without a word are never generated."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build LLaVA's layers; the unit length of config.json's activation is added here."""
        config = vllm_config.model_config.hf_config
        config.projector_hidden_act = "gelu"
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        generation = vllm_config.model_config.try_get_generation_config()
        no_words = {*generation.get("suppress_tokens", ()), config.image_token_index}
        self.no_words = torch.tensor(sorted(no_words))

    def _process_image_input(self, image_input: Any) -> Tensor:
        """Return visual embeddings [images, tokens, width]; those of a request are not changed."""
        embeddings = super()._process_image_input(image_input)
        if image_input["type"] == "image_embeds":
            return embeddings
        return normalize(embeddings, dim=-1, eps=1e-12)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Compute logits [tokens, vocabulary]; None on ranks that do not sample."""
        logits = super().compute_logits(hidden_states)
        if logits is None:
            return None
        self.no_words = self.no_words.to(logits.device)
        return logits.index_fill(-1, self.no_words, float("-inf"))
