"""megatron-core's GPTModel as a Llama or Qwen2.5 that also returns its final hidden states."""

from typing import NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_croc.config.model import AttentionBackend, LanguageModelConfig
from megatron_croc.model.core_attention import MixedMaskAttention
from megatron_croc.model.interface import Labels
from megatron_croc.model.layer_specs import language_model_spec
from megatron_croc.model.transformer_engine import Implementation
from megatron_croc.parallel.sequence import gather_for_split_and_whole_work

LLAMA3_ORIGINAL_LENGTH = 8192
"""Original context length that megatron's llama3 RoPE scaling assumes."""


class LanguageModelOutput(NamedTuple):
    """Output of the last pipeline stage."""

    token_losses: Tensor | None
    """float32 [L], cross entropy of each labelled position; None without labels."""

    logits: Tensor | None
    """[T / CP, C / TP]; only without labels."""

    hidden_states: Tensor
    """[T / CP, 1, D], after the final norm. The gradient given to it must be equal on all
    tensor-parallel ranks."""


class LanguageModel(GPTModel):
    """GPTModel whose last pipeline stage also returns its final hidden states."""

    def __init__(
        self,
        model: LanguageModelConfig,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        implementation: Implementation,
        attention_backend: AttentionBackend,
        logits_chunk: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        """Build the layers of this pipeline stage.

        Args:
            model: sizes.
            config: megatron's configuration of the same model.
            pg_collection: process groups.
            implementation: of the linear layers and norms.
            attention_backend: of the mixed-mask attention.
            pre_process: this is the first stage (embedding).
            post_process: this is the last stage (final norm, output layer).
            vp_stage: index of this model chunk under the interleaved schedule.
        """
        tp = config.tensor_model_parallel_size
        self.real_vocab_size = model.vocab_size
        linear = model.rope_scaling_type == "linear"
        num_layers = get_num_layers_to_build(config, vp_stage, pg_collection.pp.rank())
        super().__init__(
            config,
            language_model_spec(num_layers, implementation),  # type: ignore[arg-type]
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
            # Visual tokens are merged before the sequence is split over the TP ranks.
            scatter_embedding_sequence_parallel=False,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.logits_chunk = logits_chunk
        if post_process and config.sequence_parallel:
            # `_postprocess` gathers its input, and sums the ranks' gradients in backward.
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = True
        for module in self.modules():
            if isinstance(module, MixedMaskAttention):
                module.set_backend(attention_backend)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, 1, D] of ids [T]; a negative id (visual token) gets that of id 0."""
        return self.embedding(input_ids=input_ids.clamp(min=0).unsqueeze(0), position_ids=None)

    def _postprocess(  # type: ignore[override]
        self, hidden_states: Tensor, *_: object, labels: Labels | None = None, **__: object
    ) -> Tensor | LanguageModelOutput:
        """Compute the logits of all positions, or the losses of the labelled ones."""
        if not self.post_process:
            return hidden_states
        for_logits = for_caller = hidden_states
        if self.config.sequence_parallel:
            for_logits, for_caller = gather_for_split_and_whole_work(
                hidden_states, self.pg_collection.tp
            )
        if labels is None:
            return LanguageModelOutput(None, self.logits(for_logits).squeeze(1), for_caller)
        losses = self._token_losses(for_logits.index_select(0, labels.positions), labels.ids)
        return LanguageModelOutput(losses, None, for_caller)

    def _token_losses(self, hidden_L1D: Tensor, ids_L: Tensor) -> Tensor:
        """Cross entropy float32 [L], in chunks that bound the memory of the logits.

        With more than one chunk, backward computes the logits of a chunk again.
        """
        if len(ids_L) <= self.logits_chunk:
            return self._chunk_losses(hidden_L1D, ids_L)
        chunks = zip(
            hidden_L1D.split(self.logits_chunk), ids_L.split(self.logits_chunk), strict=True
        )
        return torch.cat(
            [checkpoint(self._chunk_losses, *chunk, use_reentrant=False) for chunk in chunks]
        )

    def _chunk_losses(self, hidden_L1D: Tensor, ids_L: Tensor) -> Tensor:
        ids_1L = ids_L.clamp(min=0).unsqueeze(0)  # IGNORE_INDEX is no row of the table
        return self.compute_language_model_loss(ids_1L, self.logits(hidden_L1D)).squeeze(0)

    def logits(self, hidden_L1D: Tensor) -> Tensor:
        """Logits [L, 1, C / TP] of some positions, without the padded part of the vocabulary."""
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        logits, _ = self.output_layer(hidden_L1D, weight=weight)
        return self._hide_padded_vocabulary(logits)

    def _hide_padded_vocabulary(self, logits: Tensor) -> Tensor:
        """Exclude the padded part of the vocabulary from the softmax of [S, 1, C / TP]."""
        local = logits.shape[-1]
        first = self.pg_collection.tp.rank() * local
        real = self.real_vocab_size - first
        if real >= local:
            return logits
        hidden = torch.arange(local, device=logits.device) >= real
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
