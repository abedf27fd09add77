"""CLIP or SigLIP vision tower on megatron-core, without the layers after the selected one."""

import copy
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_croc.config.model import VisionTowerConfig
from megatron_croc.model.layer_specs import vision_tower_spec
from megatron_croc.model.norm import Norm
from megatron_croc.model.transformer_engine import Implementation


class VisionTower(MegatronModule):
    """Pixels -> hidden states of every patch after the layer `vision_select_layer`.

    Later layers and the final norm are not built, because their output is not used.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        vision: VisionTowerConfig,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        implementation: Implementation,
    ) -> None:
        """Build the tower: tensor-parallel over the language model's group, or whole on each rank.

        Args:
            vision: sizes.
            config: from `vision_tower_config`; its tensor-parallel size is the language model's,
                or 1 for a whole tower.
            pg_collection: process groups.
            implementation: of the linear layers and norms.
        """
        super().__init__(config=config)
        self._replica = pg_collection.tp.rank()
        self.is_whole = config.tensor_model_parallel_size < pg_collection.tp.size()
        if self.is_whole:
            pg_collection = copy.copy(pg_collection)
            pg_collection.tp = pg_collection.ep  # without experts a group of this rank alone
            assert pg_collection.tp.size() == 1
        self.vision = vision
        is_clip = self.vision.vision_model_type == "clip"
        self.covered = self.vision.covered_img_size
        self.vit = CLIPViTModel(
            config,
            vision_tower_spec(config.num_layers, implementation),  # type: ignore[arg-type]
            ln_pre_impl=Norm,
            ln_post_impl=Norm,
            add_class_token=is_clip,
            class_token_len=1 if is_clip else 0,
            patch_dim=self.vision.patch_dim,
            img_h=self.covered,
            img_w=self.covered,
            model_subtype=self.vision.vision_model_type,
            pg_collection=pg_collection,
        )
        self.vit.ln_post = None
        self.vit.to(config.params_dtype)  # megatron builds conv1 in float32
        if self.is_whole:
            for parameter in self.parameters():  # for the gradient norm: the same on every TP rank
                parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        shape = (1, 3, 1, 1)
        self.register_buffer(
            "_mean", torch.tensor(self.vision.image_mean).view(shape), persistent=False
        )
        self.register_buffer(
            "_std", torch.tensor(self.vision.image_std).view(shape), persistent=False
        )

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """Normalise uint8 pixels [n, 3, height, width]; floats count as normalised already."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values.float() / 255.0 - self._mean) / self._std
        return pixel_values.to(self.vit.conv1.weight.dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels [n, 3, height, width], uint8 or normalised -> visual_features [n, N, D_v]."""
        x = self.normalise(pixel_values)[..., : self.covered, : self.covered]
        features = self.vit(x)
        return features[:, 1:] if self.vit.add_class_token else features

    def no_features(self) -> Tensor:
        """Visual features of no image, [0, N, D_v]."""
        weight = self.vit.conv1.weight
        return weight.new_empty(0, self.vision.num_visual_tokens, self.vision.vision_hidden_size)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """megatron's sharded state, the same tensors however the tower is split."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for entry in nested_values(state):
            if self.is_whole and isinstance(entry, ShardedBase):
                # megatron numbers replicas in the group that cuts the weights, here of one rank.
                stage, _, replica = entry.replica_id  # type: ignore[misc]
                entry.replica_id = (stage, self._replica, replica)
        return state
