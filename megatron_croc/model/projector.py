"""Vision width -> language width, then unit length."""

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.functional import normalize

from megatron_croc.config.run import RunConfig
from megatron_croc.model.layer_specs import mlp_submodules
from megatron_croc.model.transformer_configs import projector_config


class Projector(MultimodalProjector):
    """mlp2x_gelu followed by an L2 norm of every token (released code; in every stage)."""

    def __init__(self, run: RunConfig, pg_collection: ProcessGroupCollection) -> None:
        """Build the projector, tensor-parallel over the language model's group."""
        super().__init__(
            projector_config(run),
            mlp_submodules(),
            "mlp",
            input_size=run.model.vision_tower.vision_hidden_size,
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """visual_features [n, N, h_v] -> visual_embeddings [n, N, h], each of length 1."""
        return normalize(super().forward(hidden_states), dim=-1, eps=1e-12)
