"""Distribution of a checkpoint over the data-parallel ranks: each holds and writes an equal share.

Every data-parallel rank has the same weights, and its own slice of each bucket of the optimizer's
float32 state, cut across parameter boundaries. megatron-core's `fully_reshardable` format needs
whole parameters; megatron gathers all of them on every rank's host, and rank 0 writes them. Here
every parameter has one owner, and only the owner keeps its state and writes it:

    slices of a bucket   rank 0 [aaaaab]  rank 1 [bbbccc]
    gathered piece by piece on the device, at most MAX_GATHERED values at once
    kept on the host     rank 0 {a: ...}  rank 1 {b: ..., c: ...}

The files hold the same tensors under the same names as megatron's, so each can read the other's.
(megatron's are wrong if a bucket before the last is padded: the parameters behind it are shifted.)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_croc.parallel.device import current_device

Entry = ShardedTensor | ShardedTensorFactory
"""Parameter or buffer in megatron's sharded state."""

STATE_NAMES = ("param", "exp_avg", "exp_avg_sq")
"""Names of a parameter's float32 copy and of Adam's two moments."""

MAX_GATHERED = 2**25
"""Largest number of values of all ranks on the device during the gathering: 128 MiB."""


def deal_out(model_state: dict[str, Any], group: dist.ProcessGroup) -> set[Tensor]:
    """Assign every tensor of `model_state` to one rank of `group`, which writes it.

    Largest tensors first, each to the rank with the fewest bytes so far; the result is the same on
    every rank.

    Args:
        model_state: megatron's sharded state; its replica numbers are changed.
        group: data and context parallel ranks, which hold the same weights.

    Returns:
        the tensors that this rank writes.
    """
    rank, size = group.rank(), group.size()
    entries = list(_entries(model_state))
    loads = [0] * size
    mine: set[Tensor] = set()
    for entry in sorted(entries, key=_bytes, reverse=True):
        *others, replica = entry.replica_id  # type: ignore[misc]
        assert replica == rank, f"{entry.key}: replica {entry.replica_id} on rank {rank}"
        owner = loads.index(min(loads))
        entry.replica_id = (*others, (rank - owner) % size)
        if any(others):
            continue  # another tensor-parallel rank or pipeline stage writes it
        loads[owner] += _bytes(entry)
        if owner == rank and entry.data is not None:
            mine.add(entry.data)
    return mine


def state_to_save(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], mine: set[Tensor]
) -> dict[str, Any]:
    """Optimizer's sharded state with this rank's share of the tensors. Every rank must call it.

    Args:
        optimizer: DistributedOptimizers only.
        model_state: megatron's sharded state, after `deal_out`.
        mine: tensors that this rank writes, from `deal_out`.
    """

    def save(part: DistributedOptimizer) -> dict[str, Any]:
        kept = _gather(part, mine)
        return {
            **part.state_dict(),
            "param_state": _sharded(part, model_state, kept),
            "param_state_sharding_type": "fully_reshardable",
        }

    return _each_part(optimizer, save)


def state_to_load(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """Empty tensors for the parameters that this rank's optimizer has a slice of, to load into."""

    def load(part: DistributedOptimizer) -> dict[str, Any]:
        empty = {
            parameter: {name: torch.empty(parameter.shape) for name in STATE_NAMES}
            for _, slices in _buckets(part)
            for parameter in slices
        }
        return {"param_state": _sharded(part, model_state, empty)}

    return _each_part(optimizer, load)


def _entries(model_state: dict[str, Any]) -> Iterator[Entry]:
    for value in nested_values(model_state):
        if isinstance(value, Entry):
            yield value


def _bytes(entry: Entry) -> int:
    tensor = entry.data
    assert tensor is not None
    per_value = tensor.element_size() + 4 * len(STATE_NAMES) * tensor.requires_grad
    return tensor.numel() * per_value


def _each_part(
    optimizer: MegatronOptimizer, action: Callable[[DistributedOptimizer], dict[str, Any]]
) -> dict[str, Any]:
    """Apply `action` to each part: one result as it is, several by number (megatron's format)."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    states = {number: action(part) for number, part in enumerate(parts)}  # type: ignore[arg-type]
    return states[0] if len(states) == 1 else states  # type: ignore[return-value]


def _buckets(part: DistributedOptimizer) -> Iterator[tuple[Any, dict[Tensor, Any]]]:
    """All buckets, each with the parameter ranges in this rank's slice."""
    for buffer, by_dtype in zip(part.buffers, part.gbuf_ranges, strict=True):
        (ranges,) = by_dtype.values()
        for bucket, of_bucket in zip(buffer.buckets, ranges, strict=True):
            yield bucket, of_bucket["param_map"]


def _sharded(
    part: DistributedOptimizer,
    model_state: dict[str, Any],
    tensors: Mapping[Tensor, Mapping[str, Tensor]],
) -> dict[int, dict[str, Entry]]:
    """megatron's `param_state`: number of the parameter in its buffers -> sharded state."""
    entries = {entry.data: entry for entry in _entries(model_state)}
    parameters = [p for buffer in part.buffers for p in buffer.param_index_map]
    return {
        number: {
            name: _like(entries[parameter], f"optimizer.state.{name}", tensor)
            for name, tensor in tensors[parameter].items()
        }
        for number, parameter in enumerate(parameters)
        if parameter in tensors
    }


def _like(entry: Entry, prefix: str, tensor: Tensor) -> Entry:
    """Entry for `tensor` with the same sharding as `entry`."""
    changes: dict[str, Any] = {"key": f"{prefix}.{entry.key}", "data": tensor}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = tensor.dtype
    return replace(entry, **changes)


@torch.no_grad()
def _gather(part: DistributedOptimizer, mine: set[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """Gather the whole state of this rank's own parameters on the host. Every rank must call it."""
    places = {p: at for buffer in part.buffers for p, at in buffer.param_index_map.items()}
    kept: dict[Tensor, dict[str, Tensor]] = {}
    for bucket, slices in _buckets(part):
        starts: dict[Tensor, int] = {}
        for parameter in bucket.params_list:
            if parameter in mine:
                starts[parameter] = places[parameter][0] - bucket.offset
                kept[parameter] = {name: torch.empty(parameter.shape) for name in STATE_NAMES}
        for first, piece in _pieces(part, bucket.grad_data.numel(), slices):
            for parameter, start in starts.items():
                for name, values in piece.items():
                    _copy_overlap(kept[parameter][name].view(-1), start, values, first)
    return kept


def _pieces(
    part: DistributedOptimizer, bucket_numel: int, slices: dict[Tensor, Any]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """State of a bucket in pieces: offset of each rank's part, and tensors [ranks, length]."""
    group = part.data_parallel_group
    size = group.size()
    slice_numel = bucket_numel // size
    step = max(1, MAX_GATHERED // (size * len(STATE_NAMES)))
    for start in range(0, slice_numel, step):
        length = min(step, slice_numel - start)
        own = {
            name: torch.zeros(1, length, dtype=torch.float32, device=current_device())
            for name in STATE_NAMES
        }
        for parameter, ranges in slices.items():
            where = ranges["gbuf_local"]
            if where.start < start + length and where.end > start:
                state = part._get_main_param_and_optimizer_states(parameter)
                for name, row in own.items():
                    _copy_overlap(row.view(-1), start, state[name].view(1, -1), [where.start])
        piece = {}
        for name, row in own.items():
            piece[name] = row.new_empty(size, length)
            dist.all_gather_into_tensor(piece[name], row, group=group)
        yield [rank * slice_numel + start for rank in range(size)], piece


def _copy_overlap(target: Tensor, start: int, rows: Tensor, row_starts: list[int]) -> None:
    """Copy the overlap of each row with `target`; starts are offsets in the same bucket."""
    for row, row_start in zip(rows, row_starts, strict=True):
        low = max(start, row_start)
        high = min(start + target.numel(), row_start + row.numel())
        if low < high:
            target[low - start : high - start].copy_(row[low - row_start : high - row_start])
