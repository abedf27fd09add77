"""Composite model: vision tower, projector, prompt pool, language model, reconstruction head.

    first pipeline stage          ... middle stages ...          last pipeline stage
    1 embed_images   pixels -> visual embeddings [n, N, D], length 1
    2 replace        3/4 of them by pool tokens                (training stage pretrain_croc)
    3 merge          into the pack [T, 1, D]
    4 language model ----------------------------------------> text loss
    5                visual embeddings (detached) -----------> reconstruction: SmoothL1

Letters in shapes, here and in the other modules of this folder:

    T  positions of a pack      n  images                           D    hidden size of the LM
    S  positions on this rank   N  visual tokens of one image       D_v  hidden size of the tower
    B  micro-batch, always 1    R  replaced tokens of one image     H    attention heads
    C  vocabulary               P  pool tokens                      G    key/value heads
                                                                    d    size of one head

A suffix of capital letters on a variable is its shape: `visual_nND` is [n, N, D]. megatron's own
tensors are [S, B, D].

A micro-batch without images runs the projector on dummy features with weight zero, and a rank
without images leaves the tower out. All ranks then take part in the same gradient collectives.
"""

import logging
from typing import TypeVar

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
from megatron_croc.model.interface import EmbeddedImages, ModelInputs, ModelOutput, StepContext
from megatron_croc.model.language_model import LanguageModel, LanguageModelOutput
from megatron_croc.model.projector import Projector
from megatron_croc.model.prompt_pool import PromptPool, Replacement
from megatron_croc.model.reconstruction_head import build_reconstruction_head
from megatron_croc.model.token_merge import (
    merge_visual_tokens,
    take_visual_tokens,
    visual_positions,
)
from megatron_croc.model.transformer_configs import (
    params_dtype,
    projector_config,
    vision_tower_config,
)
from megatron_croc.model.transformer_engine import resolve_transformer_impl
from megatron_croc.model.vision_tower import VisionTower
from megatron_croc.ops.reconstruction_loss import reconstruction_loss_sum
from megatron_croc.ops.special_ids import IGNORE_INDEX
from megatron_croc.parallel.context import gather_sequence, split_sequence
from megatron_croc.parallel.image_share import ImageShare
from megatron_croc.parallel.stopwatch import region
from megatron_croc.parallel.target_channel import TargetChannel

logger = get_logger(__name__)

_PerImage = TypeVar("_PerImage", Tensor, tuple[int, ...])


class CrocModel(MegatronModule):
    """The parts of the model that one pipeline stage holds."""

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
        """Build the parts of this pipeline stage.

        Args:
            run: configuration of the whole run.
            config: megatron's configuration of the language model, shared with the schedule.
            pg_collection: process groups.
            pre_process: this is the first stage (vision tower, projector, pool, embedding).
            post_process: this is the last stage (final norm, output layer, head).
            target_channel: from the first to the last stage; required in stage pretrain_croc.
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

        parallel, training = run.parallel, run.training
        vision, hidden_size = run.model.vision_tower, run.model.language_model.hidden_size
        implementation = resolve_transformer_impl(run.training)
        self.image_share = ImageShare(pg_collection) if parallel.image_share_size > 1 else None
        self.vision_tower = self.projector = self.prompt_pool = None
        if pre_process:
            self.vision_tower = VisionTower(
                vision,
                vision_tower_config(vision, parallel=parallel, training=training),
                pg_collection,
                implementation=implementation,
            )
            self.projector = Projector(
                projector_config(hidden_size, parallel=parallel, training=training),
                pg_collection,
                input_size=vision.vision_hidden_size,
            )
        if pre_process and run.reconstructs:
            self.prompt_pool = PromptPool(
                run.model.prompt_pool,
                pg_collection,
                num_visual_tokens=vision.num_visual_tokens,
                hidden_size=hidden_size,
                dtype=params_dtype(run.training),
            )
        self.language_model = LanguageModel(
            run.model.language_model,
            config,
            pg_collection,
            implementation=implementation,
            attention_backend=run.model.attention_backend,
            logits_chunk=run.training.logits_chunk,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.reconstruction_head = None
        if post_process and run.reconstructs:
            self.reconstruction_head = build_reconstruction_head(
                run.model.reconstruction,
                hidden_size=hidden_size,
                num_visual_tokens=vision.num_visual_tokens,
                dtype=params_dtype(run.training),
            )
        self.share_embeddings_and_output_weights = (
            self.language_model.share_embeddings_and_output_weights
        )
        self.embeds_ahead = pre_process and self._can_embed_ahead()
        # Buckets are reduced as gradients get ready, and gathered as modules are called: in one
        # order on all ranks only if all call the tower. Some wait for others' images anyway.
        overlaps = run.optimizer.overlap_grad_reduce or run.optimizer.overlap_param_gather
        self.calls_tower_always = overlaps and not training.freeze_ViT

    def _can_embed_ahead(self) -> bool:
        """Return True if images may be embedded, and their matching started, a micro-batch early.

        A trained vision tower would keep the activations of a second micro-batch for it.
        """
        training, pool = self.run.training, self.run.model.prompt_pool
        if not self.run.reconstructs or not pool.overlap_assignment:
            return False
        if not training.freeze_ViT:
            log_once(
                logger,
                logging.INFO,
                "matching is not overlapped: a trained vision tower would keep the activations of "
                "another micro-batch for it",
            )
        return training.freeze_ViT

    def forward(
        self,
        inputs: ModelInputs,
        upcoming: ModelInputs | None = None,
        context: StepContext | None = None,
    ) -> Tensor | ModelOutput:
        """Compute this stage's part of one micro-batch.

        Args:
            inputs: this micro-batch.
            upcoming: the next micro-batch of the same step; with a `context`, its matching may
                start here.
            context: values shared by the forward passes of the step; None for a single pass.

        Returns:
            Hidden states [S, 1, D] for the next stage, or the losses on the last stage.
        """
        if context is None:
            context, upcoming = StepContext(), None
        decoder_input = self._embed(inputs, upcoming, context) if self.pre_process else None
        output = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=inputs.labels,
            packed_seq_params=MixedMaskParams.of(inputs.mixed_mask),
        )
        if not self.post_process:
            return output
        return self._losses(output, inputs)

    def _embed(
        self, inputs: ModelInputs, upcoming: ModelInputs | None, context: StepContext
    ) -> Tensor:
        """Input of the decoder [S, 1, D]: text embeddings and (replaced) visual tokens."""
        embedded = context.take_embedded(inputs) or self._embed_images(inputs)
        visual_nND = embedded.visual
        if self.target_channel is not None and self.run.reconstructs:
            self.target_channel.put(self._own_images(visual_nND.detach()))
        if self.prompt_pool is not None:
            replacement = self._replace(self.prompt_pool, embedded, inputs)
            visual_nND = replacement.embeddings
            if context.on_replacement is not None:
                context.on_replacement(replacement)
            if upcoming is not None and self.embeds_ahead:
                self._embed_ahead(self.prompt_pool, upcoming, context)
        return self._merge(visual_nND, inputs) + embedded.zero_term

    def _embed_ahead(self, pool: PromptPool, upcoming: ModelInputs, context: StepContext) -> None:
        """Embed the next micro-batch's images, to match them while this micro-batch computes.

        The result equals that of a later call, because weights change only between steps. It costs
        the memory of one more micro-batch of visual embeddings. The pool's weights are read outside
        of its forward pass; this micro-batch has already called it, so `overlap_param_gather` has
        gathered them.
        """
        if len(upcoming.replaced) == 0:
            return
        embedded = self._embed_images(upcoming)
        pending = pool.start_matching(embedded.visual, upcoming.replaced, ahead=True)
        context.embedded_ahead = upcoming, embedded._replace(pending=pending)

    @region("vision")
    def _embed_images(self, inputs: ModelInputs) -> EmbeddedImages:
        """Vision tower and projector over the images; without images, dummy features."""
        assert self.vision_tower is not None and self.projector is not None
        assert inputs.pixel_values is not None, "the first stage needs pixel_values"
        trains_tower = self.training and not self.run.training.freeze_ViT
        with torch.set_grad_enabled(trains_tower and torch.is_grad_enabled()):
            features = self._visual_features(inputs.pixel_values)
        if len(features) == 0:
            dummy = features.new_zeros(1, *features.shape[1:]) + features.sum()
            visual_nND = self.projector(dummy)
            return EmbeddedImages(visual_nND[:0], 0.0 * visual_nND.sum())
        return EmbeddedImages(self.projector(features), 0.0)

    def _visual_features(self, pixels: Tensor) -> Tensor:
        """Vision tower over all images, or over this rank's share and gathered: [n, N, D_v].

        Features are gathered, not visual embeddings: they are smaller, and a frozen tower then
        needs no exchange in backward.
        """
        assert self.vision_tower is not None
        if self.image_share is None:
            return self._own_features(self.vision_tower, pixels)
        own = self._own_features(self.vision_tower, self.image_share.own(pixels))
        return self.image_share.gather(own, len(pixels))

    def _own_features(self, tower: VisionTower, pixels: Tensor) -> Tensor:
        """Vision tower over the images of this rank, which may be none."""
        if len(pixels):
            return tower(pixels)
        if self.calls_tower_always:
            return tower(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
        return tower.no_features().requires_grad_(torch.is_grad_enabled())

    @region("matching")
    def _replace(
        self, pool: PromptPool, embedded: EmbeddedImages, inputs: ModelInputs
    ) -> Replacement:
        """Replace the chosen visual tokens by pool tokens.

        The pool is called even without images. Its gradient is then reduced in every step, and
        `overlap_param_gather` gathers its weights.
        """
        return pool(embedded.visual, inputs.replaced, embedded.pending)

    def _merge(self, visual_nND: Tensor, inputs: ModelInputs) -> Tensor:
        """Text and visual tokens in one pack [T, 1, D]; this rank's part [S, 1, D]."""
        text_T1D = self.language_model.embed_text(inputs.input_ids)
        positions_nN = visual_positions(inputs.image_starts, self.num_visual_tokens)
        merged = merge_visual_tokens(text_T1D, visual_nND, positions_nN)
        merged = split_sequence(merged, self.pg_collection.cp)
        if self.config.sequence_parallel:
            merged = tensor_parallel.scatter_to_sequence_parallel_region(
                merged, group=self.pg_collection.tp
            )
        return merged

    def _losses(self, output: LanguageModelOutput, inputs: ModelInputs) -> ModelOutput:
        """Loss sums of this rank's part of the pack."""
        text_loss_sum = None
        if inputs.labels is not None:
            assert output.token_losses is not None
            text_loss_sum = (output.token_losses * (inputs.labels.ids != IGNORE_INDEX)).sum()
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
        """Reconstruction head and loss over all visual tokens, not only the replaced ones.

        Under context parallelism every rank computes this for its share of the images.
        """
        assert self.reconstruction_head is not None and self.target_channel is not None
        hidden_states = gather_sequence(hidden_states, self.pg_collection.cp)
        starts = self._own_images(inputs.image_starts)
        positions_nN = visual_positions(starts, self.num_visual_tokens)
        hidden_nND = take_visual_tokens(hidden_states, positions_nN)
        target_nND = self.target_channel.get(
            tuple(hidden_nND.shape), dtype=hidden_nND.dtype, device=hidden_nND.device
        )
        if hidden_nND.shape[0] == 0:
            dummy = hidden_nND.new_zeros(1, *hidden_nND.shape[1:])
            zero_term = self.reconstruction_head(dummy).float().sum() + hidden_states.float().sum()
            return hidden_nND, 0.0 * zero_term
        seeds = tuple(self._own_images(inputs.image_seeds))
        prediction_nND = self.reconstruction_head(hidden_nND, seeds or None)
        beta = self.run.model.reconstruction.smooth_l1_beta
        return prediction_nND, reconstruction_loss_sum(prediction_nND, target_nND, beta=beta)

    def _own_images(self, per_image: _PerImage) -> _PerImage:
        """Images that this context-parallel rank reconstructs."""
        cp = self.pg_collection.cp
        return per_image[cp.rank() :: cp.size()]

    def image_shared_parameters(self) -> frozenset[Tensor]:
        """Trained parameters with gradients of this rank's share of the images alone."""
        if self.image_share is None or self.vision_tower is None:
            return frozenset()
        return frozenset(p for p in self.vision_tower.parameters() if p.requires_grad)

    # Methods that megatron-core's schedules and gradient finalisation call.

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the hidden states received from the previous stage."""
        self.language_model.set_input_tensor(input_tensor)  # type: ignore[arg-type]

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Tied embedding of this stage; None if there is none."""
        return self.language_model.shared_embedding_or_output_weight()
