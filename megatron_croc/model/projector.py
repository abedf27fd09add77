"""Projector from the vision tower's width to the language model's, with normalised output."""

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import normalize

from megatron_croc.model.layer_specs import mlp_submodules


class Projector(MultimodalProjector):
    """mlp2x_gelu and L2 normalisation of every token, as in the released code (all stages)."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, *, input_size: int
    ) -> None:
        """Build the projector, tensor-parallel over the language model's group.

        Args:
            config: from `projector_config`.
            pg_collection: process groups.
            input_size: D_v, width of the vision tower.
        """
        super().__init__(
            config, mlp_submodules(), "mlp", input_size=input_size, tp_group=pg_collection.tp
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """visual_features [n, N, D_v] -> visual_embeddings [n, N, D], each of length 1."""
        return normalize(super().forward(hidden_states), dim=-1, eps=1e-12)
