"""The composite model: vision tower, projector, prompt pool, language model, reconstruction head.

    first pipeline stage        ... middle stages ...        last stage
    1 embed_images   pixels -> visual_embeddings [n, N, h], length 1
    2 replace        3/4 of them by pool tokens              (stage pretrain_croc)
    3 merge          into the text row [T, 1, h]
    4 language model ------------------------------------->  text loss
    5                visual_embeddings (detached) -------->  reconstruct: SmoothL1

Micro-batches without images run the same graph on a dummy image whose output counts zero times, so
no rank waits for a gradient that never comes.
"""

import logging
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_croc.config.run import RunConfig
from megatron_croc.log import get_logger, log_once
from megatron_croc.model.core_attention import MixedMaskParams
from megatron_croc.model.language_model import LanguageModel, LanguageModelOutput
from megatron_croc.model.projector import Projector
from megatron_croc.model.prompt_pool import PendingReplacement, PromptPool, Replacement
from megatron_croc.model.reconstruction_head import build_reconstruction_head
from megatron_croc.model.token_merge import (
    merge_visual_tokens,
    take_visual_tokens,
    visual_positions,
)
from megatron_croc.model.vision_tower import VisionTower
from megatron_croc.ops.mixed_mask import MixedMask
from megatron_croc.ops.reconstruction_loss import reconstruction_loss_sum
from megatron_croc.parallel.context import gather_sequence, split_sequence
from megatron_croc.parallel.stopwatch import region
from megatron_croc.parallel.target_channel import TargetChannel

logger = get_logger(__name__)

_PerImage = TypeVar("_PerImage", Tensor, tuple[int, ...])

IGNORED = -100
"""Label of a position without a text loss."""


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One packed row, on the device. T tokens, n images of N visual tokens (n may be 0)."""

    input_ids: Tensor
    """int64 [T], negative at visual positions."""

    labels: Tensor | None
    """int64 [T], shifted, IGNORED where there is no text loss; None: logits are returned."""

    mixed_mask: MixedMask
    """Of length T."""

    image_starts: Tensor
    """int64 [n]."""

    replaced: Tensor
    """bool [n, N]."""

    pixel_values: Tensor | None
    """[n, 3, H, W], uint8 or normalised; needed on the first stage only."""

    image_seeds: tuple[int, ...] = ()
    """One per image, for the head's dropout; empty: none."""


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What the last pipeline stage returns. Losses are sums; the caller divides by counts."""

    text_loss_sum: Tensor | None
    """float32 scalar over this CP rank's labelled positions; None without labels."""

    reconstruction_loss_sum: Tensor
    """float32 scalar over every element of this CP rank's images; 0 outside pretrain_croc."""

    logits: Tensor | None = None
    """[T, vocabulary of this TP rank], without labels."""

    hidden_states: Tensor | None = None
    """[T, 1, h] (this rank's part under CP and SP), after the final norm."""

    reconstruction: Tensor | None = None
    """[n, N, h], the head's output for this CP rank's images."""


def _embeds_ahead(run: RunConfig) -> bool:
    """Whether images are embedded, and their matching pending, a micro-batch early."""
    if not run.reconstructs or not run.model.prompt_pool.overlap_assignment:
        return False
    if not run.training.freeze_ViT:
        log_once(
            logger,
            logging.INFO,
            "matching is not overlapped: a trained vision tower would keep the activations of "
            "another micro-batch for it",
        )
    return run.training.freeze_ViT


class _Embedded(NamedTuple):
    """A micro-batch's images before their tokens are replaced."""

    visual: Tensor
    """visual_embeddings [n, N, h]."""

    zero_term: Tensor | float
    """A zero that ties a dummy image into the graph."""

    pending: PendingReplacement | None = None
    """Their matching, if it was pending early."""


class CrocModel(MegatronModule):
    """One pipeline stage's share of the model."""

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        pre_process: bool,
        post_process: bool,
        target_channel: TargetChannel | None = None,
        vp_stage: int | None = None,
    ) -> None:
        """Build what this stage holds.

        Args:
            run: sizes, stage and choices.
            config: the language model's, shared with the schedule.
            pg_collection: process groups.
            pre_process: this is the first stage (vision tower, projector, pool, embedding).
            post_process: this is the last stage (final norm, output layer, head).
            target_channel: from the first to the last stage; needed by stage pretrain_croc.
            vp_stage: index of this model chunk under the interleaved schedule.
        """
        super().__init__(config=config)
        self.run = run
        self.pre_process, self.post_process = pre_process, post_process
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.pg_collection = pg_collection
        self.target_channel = target_channel
        self.num_visual_tokens = run.model.vision_tower.num_visual_tokens
        self.last_replacement: Replacement | None = None
        self._ahead: tuple[ModelInputs, _Embedded] | None = None
        self._embeds_ahead = _embeds_ahead(run) if pre_process else False

        reconstructs = run.reconstructs
        self.vision_tower = VisionTower(run, pg_collection) if pre_process else None
        self.projector = Projector(run, pg_collection) if pre_process else None
        self.prompt_pool = PromptPool(run, pg_collection) if pre_process and reconstructs else None
        self.language_model = LanguageModel(
            run,
            config,
            pg_collection,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.reconstruction_head = (
            build_reconstruction_head(run) if post_process and reconstructs else None
        )
        self.share_embeddings_and_output_weights = (
            self.language_model.share_embeddings_and_output_weights
        )

    def forward(
        self, inputs: ModelInputs, upcoming: ModelInputs | None = None
    ) -> Tensor | ModelOutput:
        """Run this stage; hidden states for the next one, or the losses on the last.

        Args:
            inputs: this micro-batch.
            upcoming: the next one of the same optimizer step, if any; its matching may begin here.
        """
        decoder_input = None
        if self.pre_process:
            embedded = self._take_embedded(inputs)
            visual = embedded.visual
            if self.target_channel is not None and self.run.reconstructs:
                self.target_channel.put(self._own_images(visual.detach()))
            visual = self._replace(embedded, inputs)
            if upcoming is not None:
                self._embed_ahead(upcoming)
            decoder_input = self._merge(visual, inputs) + embedded.zero_term
        labels = inputs.labels
        if labels is not None:
            labels = split_sequence(labels, self.pg_collection.cp)
        output = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=None if labels is None else labels.unsqueeze(0),
            packed_seq_params=MixedMaskParams.of(inputs.mixed_mask),
        )
        if not self.post_process:
            return output
        return self._losses(output, labels, inputs)

    def _take_embedded(self, inputs: ModelInputs) -> _Embedded:
        """This micro-batch's images: embedded ahead, or now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is inputs:
            return ahead[1]
        return self._embed_images(inputs)

    def _embed_ahead(self, upcoming: ModelInputs) -> None:
        """Embed the next micro-batch's images, so that they are matched while this one computes.

        Weights only change between optimizer steps, so its numbers are those it would have later.
        It costs the memory of one more micro-batch of visual embeddings, which a trained tower's
        activations would make large. The pool is read outside of its forward pass: this micro-batch
        has called it before, so `overlap_param_gather` has its rows in place.
        """
        pool = self.prompt_pool
        if pool is None or not self._embeds_ahead:
            return
        if len(upcoming.replaced) == 0:
            return
        embedded = self._embed_images(upcoming)
        pending = pool.start_matching(embedded.visual, upcoming.replaced, ahead=True)
        self._ahead = upcoming, embedded._replace(pending=pending)

    @region("vision")
    def _embed_images(self, inputs: ModelInputs) -> _Embedded:
        assert self.vision_tower is not None and self.projector is not None
        pixels = inputs.pixel_values
        assert pixels is not None, "the first stage needs pixel_values"
        is_dummy = pixels.shape[0] == 0
        if is_dummy:
            pixels = pixels.new_zeros(1, *pixels.shape[1:])
        trains_tower = self.training and not self.run.training.freeze_ViT
        with torch.set_grad_enabled(trains_tower and torch.is_grad_enabled()):
            features = self.vision_tower(pixels)
        visual = self.projector(features)
        if is_dummy:
            return _Embedded(visual[:0], 0.0 * visual.sum())
        return _Embedded(visual, 0.0)

    @region("matching")
    def _replace(self, embedded: _Embedded, inputs: ModelInputs) -> Tensor:
        """Pool tokens in place of the chosen visual tokens.

        The pool is called without images too: so its gradient is reduced in every step, and with
        overlap_param_gather its gathered weights come in.
        """
        visual = embedded.visual
        if self.prompt_pool is None:
            return visual
        replacement: Replacement = self.prompt_pool(visual, inputs.replaced, embedded.pending)
        self.last_replacement = replacement
        return replacement.embeddings

    def _merge(self, visual: Tensor, inputs: ModelInputs) -> Tensor:
        """Text and visual tokens in one row [T, 1, h], this rank's part under CP and SP."""
        text = self.language_model.embed_text(inputs.input_ids)
        positions = visual_positions(inputs.image_starts, self.num_visual_tokens)
        merged = merge_visual_tokens(text, visual, positions)
        merged = split_sequence(merged, self.pg_collection.cp)
        if self.config.sequence_parallel:
            merged = tensor_parallel.scatter_to_sequence_parallel_region(
                merged, group=self.pg_collection.tp
            )
        return merged

    def _losses(
        self, output: LanguageModelOutput, labels: Tensor | None, inputs: ModelInputs
    ) -> ModelOutput:
        text_loss_sum = None
        if labels is not None:
            counted = labels != IGNORED
            assert output.token_losses is not None
            text_loss_sum = (output.token_losses * counted).sum()
        reconstruction, loss = None, output.hidden_states.new_zeros((), dtype=torch.float32)
        if self.reconstruction_head is not None:
            reconstruction, loss = self._reconstruct(output.hidden_states, inputs)
        return ModelOutput(
            text_loss_sum=text_loss_sum,
            reconstruction_loss_sum=loss,
            logits=output.logits,
            hidden_states=output.hidden_states,
            reconstruction=reconstruction,
        )

    @region("reconstruction")
    def _reconstruct(self, hidden_states: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Head and loss over all visual positions, not only the replaced ones.

        Under context parallelism every rank does this for its share of the images.
        """
        assert self.reconstruction_head is not None and self.target_channel is not None
        if self.config.sequence_parallel:
            # Every rank runs the whole head, so each already holds the whole gradient: give back
            # only this rank's slice of it instead of summing.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        hidden_states = gather_sequence(hidden_states, self.pg_collection.cp)
        starts = self._own_images(inputs.image_starts)
        tokens = take_visual_tokens(hidden_states, visual_positions(starts, self.num_visual_tokens))
        target = self.target_channel.get(
            tuple(tokens.shape), dtype=tokens.dtype, device=tokens.device
        )
        if tokens.shape[0] == 0:
            dummy = tokens.new_zeros(1, *tokens.shape[1:])
            zero_term = self.reconstruction_head(dummy).float().sum() + hidden_states.float().sum()
            return tokens, 0.0 * zero_term
        seeds = tuple(self._own_images(inputs.image_seeds))
        prediction = self.reconstruction_head(tokens, seeds or None)
        beta = self.run.model.reconstruction.smooth_l1_beta
        return prediction, reconstruction_loss_sum(prediction, target, beta=beta)

    def _own_images(self, per_image: _PerImage) -> _PerImage:
        """The images this context-parallel rank reconstructs."""
        cp = self.pg_collection.cp
        return per_image[cp.rank() :: cp.size()]

    # What megatron-core's schedules and gradient finalisation ask of a model.

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states of the stage before."""
        self.language_model.set_input_tensor(input_tensor)  # type: ignore[arg-type]

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied embedding, where there is one on this stage."""
        return self.language_model.shared_embedding_or_output_weight()
