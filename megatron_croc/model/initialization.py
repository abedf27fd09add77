"""Fresh weights: a pure function of seed and global parameter name, equal at any layout."""

import hashlib
import math

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.nn.functional import normalize

from megatron_croc.config.model import CrocModelConfig
from megatron_croc.model.sharded_weights import Shard, fill_weights


def initialize_weights(chunk: nn.Module, model: CrocModelConfig, *, seed: int) -> None:
    """Draw every weight of a model chunk: matrices normal, norms 1, biases 0."""
    fill_weights(chunk, lambda shard: fresh_weight(shard, model, seed=seed))
    _mark_tensor_parallel(chunk)


def _mark_tensor_parallel(chunk: nn.Module) -> None:
    """Mark tensor-parallel weights for the gradient norm.

    megatron 0.16 sets these marks only while it draws weights, which is turned off here; 0.19
    always sets them. Without the marks the norm counts only the first TP rank's shard.
    """
    cut_dim = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        dim, weight = cut_dim.get(type(module)), getattr(module, "weight", None)
        if dim is None or weight is None or hasattr(weight, "tensor_model_parallel"):
            continue
        set_tensor_model_parallel_attributes(weight, True, dim, 1)


def fresh_weight(shard: Shard, model: CrocModelConfig, *, seed: int) -> Tensor:
    """Draw the whole tensor that a shard belongs to, float32."""
    name = shard.key.rsplit(".", 1)[-1]
    if len(shard.shape) == 1:
        return torch.full(shard.shape, 0.0 if name.endswith("bias") else 1.0)
    generator = torch.Generator().manual_seed(_seed_of(shard.name, seed))
    drawn = torch.empty(shard.shape).normal_(generator=generator)
    if shard.key.startswith("prompt_pool."):
        return normalize(drawn, dim=1) if model.prompt_pool.pool_init == "unit" else drawn
    return drawn * _standard_deviation(shard.key, model)


def _standard_deviation(key: str, model: CrocModelConfig) -> float:
    """`init_method_std`, divided by sqrt(2 * layers) for output layers of the residual (GPT-2)."""
    std = model.language_model.init_method_std
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        if key.startswith("language_model."):
            return std / math.sqrt(2.0 * model.language_model.num_layers)
        if key.startswith("vision_tower."):
            return std / math.sqrt(2.0 * model.vision_tower.num_active_layers)
    return std


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
