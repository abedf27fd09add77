"""CLIP or SigLIP on megatron-core, cut off after the layer whose output Croc reads."""

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_croc.config.model import VisionTowerConfig
from megatron_croc.config.run import RunConfig
from megatron_croc.model.layer_specs import vision_tower_spec
from megatron_croc.model.norm import Norm
from megatron_croc.model.transformer_configs import vision_tower_config
from megatron_croc.model.transformer_engine import resolve_transformer_impl


class VisionTower(MegatronModule):
    """pixels -> hidden_states[vision_select_layer] of every patch.

    Layers behind the selected one and the final norm do not exist here: they never run.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, run: RunConfig, pg_collection: ProcessGroupCollection) -> None:
        """Build the tower, tensor-parallel over the language model's group."""
        config = vision_tower_config(run)
        super().__init__(config=config)
        self.vision: VisionTowerConfig = run.model.vision_tower
        is_clip = self.vision.vision_model_type == "clip"
        self.covered = self.vision.covered_img_size
        self.vit = CLIPViTModel(
            config,
            vision_tower_spec(config.num_layers, resolve_transformer_impl(run)),  # type: ignore[arg-type]
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
        self.vit.to(config.params_dtype)  # conv1 is always born in float32
        shape = (1, 3, 1, 1)
        self.register_buffer(
            "_mean", torch.tensor(self.vision.image_mean).view(shape), persistent=False
        )
        self.register_buffer(
            "_std", torch.tensor(self.vision.image_std).view(shape), persistent=False
        )

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """uint8 pixels -> normalised floats; floats are taken as already normalised."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values.float() / 255.0 - self._mean) / self._std
        return pixel_values.to(self.vit.conv1.weight.dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels [n, 3, H, W], uint8 or normalised -> visual_features [n, N, h_v]."""
        x = self.normalise(pixel_values)[..., : self.covered, : self.covered]
        features = self.vit(x)
        return features[:, 1:] if self.vit.add_class_token else features
