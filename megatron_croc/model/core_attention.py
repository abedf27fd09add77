"""Core attention of language model and vision tower, with the interface of megatron-core."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_croc.errors import ConfigError
from megatron_croc.ops.attention import attend
from megatron_croc.ops.attention.backends import choose_backend
from megatron_croc.ops.attention.dense import attend_full
from megatron_croc.ops.mixed_mask import MixedMask
from megatron_croc.parallel.context import (
    gather_sequence,
    heads_to_sequence,
    local_positions,
    sequence_to_heads,
)
from megatron_croc.parallel.device import current_device


@dataclass
class MixedMaskParams(PackedSeqParams):
    """Argument that carries the mixed mask through megatron's layers to every core attention.

    `attention_mask` cannot carry it: recomputation saves that argument for backward, and saves
    tensors only; this one is captured by closure. The format stays `sbhd`, a pack is a batch of
    one. Rotary positions are relative, so they need no restart at each sample.
    """

    mixed_mask: MixedMask | None = None

    @classmethod
    def of(cls, mask: MixedMask) -> "MixedMaskParams":
        """Wrap `mask`; the maximum lengths are the pack's (rotary embeddings read them)."""
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
        self.config = config
        assert attention_type == "self" and config.kv_channels is not None
        if config.attention_dropout != 0.0:
            raise ConfigError(
                f"attention_dropout={config.attention_dropout}: no attention backend implements "
                "dropout; set it to 0"
            )
        assert pg_collection is not None
        self.cp = pg_collection.cp
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5


class MixedMaskAttention(_CoreAttention):
    """Self-attention of the language model under the mask of `MixedMaskParams`."""

    backend = "auto"

    def set_backend(self, name: str) -> None:
        """Use the backend `name`.

        Raises:
            ConfigError: it does not run on this device, in this dtype or at this head dim. The
                check is here, so that it fails when the model is built.
        """
        shape = (1, 1, self.config.kv_channels or 0)
        like = torch.empty(shape, dtype=self.config.params_dtype, device=current_device())
        choose_backend(name, like)
        self.backend = name

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
        """[S, 1, H, d], [S, 1, G, d], [S, 1, G, d] -> [S, 1, H * d].

        H and G are heads of this tensor-parallel rank, S positions of this context-parallel rank.
        """
        assert packed_seq_params is not None and packed_seq_params.mixed_mask is not None
        mask = packed_seq_params.mixed_mask
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        heads_divide = k.shape[1] % self.cp.size() == 0
        out = (self._over_heads if heads_divide else self._over_positions)(q, k, v, mask)
        return out.reshape(out.shape[0], 1, -1)

    def _over_heads(self, query: Tensor, key: Tensor, value: Tensor, mask: MixedMask) -> Tensor:
        """Context parallel by all-to-all: this rank's part of the heads, over the whole pack."""
        q, k, v = (sequence_to_heads(x, self.cp) for x in (query, key, value))
        out = attend(q, k, v, mask, softmax_scale=self.softmax_scale, backend=self.backend)
        return heads_to_sequence(out, self.cp)

    def _over_positions(self, query: Tensor, key: Tensor, value: Tensor, mask: MixedMask) -> Tensor:
        """Context parallel by gathering keys and values: all heads, at this rank's positions."""
        k, v = gather_sequence(key, self.cp), gather_sequence(value, self.cp)
        # On the host: to read positions from the device would be a device sync.
        positions = local_positions(mask.length, self.cp, torch.device("cpu")).view(2, -1)
        chunks = [(int(chunk[0]), int(chunk[-1]) + 1) for chunk in positions]
        return attend(
            query,
            k,
            v,
            mask,
            softmax_scale=self.softmax_scale,
            backend=self.backend,
            chunks=chunks,
        )


class FullAttention(_CoreAttention):
    """Self-attention of the vision tower, without a mask."""

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
        """[s, b, H, d] each -> [s, b, H * d], for the heads of this tensor-parallel rank."""
        out = attend_full(query, key, value, softmax_scale=self.softmax_scale)
        return out.flatten(2)
