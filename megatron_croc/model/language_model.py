"""megatron-core's GPTModel as a Llama or Qwen2.5, giving hidden states beside the text loss."""

from typing import NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megatron_croc.config.run import RunConfig
from megatron_croc.model.core_attention import MixedMaskAttention
from megatron_croc.model.layer_specs import language_model_spec
from megatron_croc.model.transformer_engine import resolve_transformer_impl

LLAMA3_ORIGINAL_LENGTH = 8192
"""Original context that megatron's llama3 rope scaling assumes."""


class LanguageModelOutput(NamedTuple):
    """What the last pipeline stage computes."""

    token_losses: Tensor | None
    """float32 [T], cross entropy of every position; None without labels."""

    logits: Tensor | None
    """[T, vocabulary of this TP rank]; only without labels."""

    hidden_states: Tensor
    """[T / sequence-parallel size, 1, h], after the final norm."""


class LanguageModel(GPTModel):
    """GPTModel whose last stage also hands out its final hidden states."""

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        """Build this stage's share of the language model."""
        model, tp = run.model.language_model, run.parallel.tensor_model_parallel_size
        self.real_vocab_size = model.vocab_size
        linear = model.rope_scaling_type == "linear"
        num_layers = get_num_layers_to_build(config, vp_stage, pg_collection.pp.rank())
        super().__init__(
            config,
            language_model_spec(num_layers, resolve_transformer_impl(run)),  # type: ignore[arg-type]
            vocab_size=-(-model.vocab_size // tp) * tp,
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,  # type: ignore[arg-type]
            rope_scaling=model.rope_scaling_type == "llama3",
            rope_scaling_factor=model.rope_scaling_factor,
            seq_len_interpolation_factor=model.rope_scaling_factor if linear else None,
            # Visual tokens are merged before the sequence is cut over the TP ranks.
            scatter_embedding_sequence_parallel=False,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        for module in self.modules():
            if isinstance(module, MixedMaskAttention):
                module.set_backend(run.model.attention_backend)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, 1, h] of ids [T]; negative ids (visual placeholders) look up row 0."""
        return self.embedding(input_ids=input_ids.clamp(min=0).unsqueeze(0), position_ids=None)

    def _postprocess(  # type: ignore[override]
        self, hidden_states: Tensor, *_: object, labels: Tensor | None = None, **__: object
    ) -> Tensor | LanguageModelOutput:
        if not self.post_process:
            return hidden_states
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        logits = self._hide_padded_vocabulary(logits)
        if labels is None:
            return LanguageModelOutput(None, logits.squeeze(1), hidden_states)
        losses = self.compute_language_model_loss(labels.clamp(min=0), logits)
        return LanguageModelOutput(losses.squeeze(0), None, hidden_states)

    def _hide_padded_vocabulary(self, logits: Tensor) -> Tensor:
        """Rows that only round the vocabulary up to the TP size must not share in the softmax."""
        local = logits.shape[-1]
        first = self.pg_collection.tp.rank() * local
        real = self.real_vocab_size - first
        if real >= local:
            return logits
        hidden = torch.arange(local, device=logits.device) >= real
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
