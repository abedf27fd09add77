"""The two attentions of the model, in the form megatron-core's `core_attention` slot expects."""

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_croc.ops.attention import attend
from megatron_croc.ops.attention.dense import attend_full
from megatron_croc.ops.mixed_mask import MixedMask


@dataclass
class MixedMaskParams(PackedSeqParams):
    """Carries the mixed mask through megatron's layers to every core attention.

    It takes the place of `attention_mask` because recomputation saves that argument for backward
    (tensors only) while this one is captured by closure. The format stays `sbhd`: one packed row
    is a batch of one, and rotary positions need no restart per sample because they are relative.
    """

    mixed_mask: MixedMask | None = None

    @classmethod
    def of(cls, mask: MixedMask) -> "MixedMaskParams":
        """Wrap `mask`; the maximum lengths are the row's (rotary embeddings read them)."""
        return cls(
            qkv_format="sbhd", max_seqlen_q=mask.length, max_seqlen_kv=mask.length, mixed_mask=mask
        )


class _CoreAttention(nn.Module):
    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and config.kv_channels is not None
        assert config.attention_dropout == 0.0, "attention dropout is not part of this model"
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5


class MixedMaskAttention(_CoreAttention):
    """Self-attention of the language model; reads the mask from `MixedMaskParams`."""

    backend = "auto"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: MixedMaskParams | None = None,
    ) -> Tensor:
        """[s, 1, H, d], [s, 1, G, d], [s, 1, G, d] -> [s, 1, H * d]; heads are this rank's."""
        assert packed_seq_params is not None and packed_seq_params.mixed_mask is not None
        out = attend(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            packed_seq_params.mixed_mask,
            softmax_scale=self.softmax_scale,
            backend=self.backend,
        )
        return out.reshape(out.shape[0], 1, -1)


class FullAttention(_CoreAttention):
    """Self-attention of the vision tower: every patch sees every patch."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[s, b, H, d] each -> [s, b, H * d]; heads are this rank's."""
        out = attend_full(query, key, value, softmax_scale=self.softmax_scale)
        return out.flatten(2)
