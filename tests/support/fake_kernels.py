"""Stand-ins for optional attention packages: their documented signatures, evaluated densely."""

import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch

from megatron_croc.ops.attention import fa4, ffa, packages
from megatron_croc.ops.attention.dense import attend_formula


def install(monkeypatch, **modules):
    """Modules by name (`__` for a dot), as if installed; the checks of device and version pass."""
    for name, contents in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for cached in (packages._import, fa4._mask_mod):
        monkeypatch.setattr(sys.modules[cached.__module__], cached.__name__, cached.__wrapped__)
    for backend in (fa4, ffa):
        monkeypatch.setattr(backend, "unsupported_reason", lambda _: None)
        monkeypatch.setattr(backend, "name_unknown_version", lambda _: None)


# magi_attention.functional.flex_flash_attn_func, as in its version 1.1.1.


def flex_flash_attn_func(
    q,
    k,
    v,
    q_ranges=None,
    k_ranges=None,
    attn_type_map=None,
    *,
    sink=None,
    sink_layout="sh",
    softmax_scale=None,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
    disable_fwd_atomic_reduction=False,
    disable_bwd_dkv_atomic_reduction=False,
    ref_block_size=None,
    max_seqlen_q=None,
    auto_range_merge=False,
    swap_ab=False,
    pack_gqa=False,
    cat_gqa=False,
    sparse_load=False,
    swap_bwd_qk_loop=False,
    return_max_logits=False,
):
    assert sink is None and softcap == 0.0 and isinstance(deterministic, bool)
    assert not disable_bwd_dkv_atomic_reduction  # key ranges overlap
    for x in (q_ranges, k_ranges, attn_type_map):
        assert x.dtype == torch.int32 and x.is_contiguous() and x.device == q.device
    assert q_ranges.shape == k_ranges.shape == (len(attn_type_map), 2)
    times = count_pairs(q_ranges, k_ranges, attn_type_map, len(q), len(k))
    assert times.max() <= 1, "a pair in two rectangles counts twice in the softmax"
    if disable_fwd_atomic_reduction:
        rows = torch.zeros(len(q), dtype=torch.int64)
        for begin, end in q_ranges.tolist():
            rows[begin:end] += 1
        assert (rows == 1).all(), "each row is written once; the others hold garbage"
    out = attend_formula(q, k, v, times.bool(), softmax_scale=softmax_scale)
    return out, SimpleNamespace(lse=None, max_logits=None)


def count_pairs(q_ranges, k_ranges, kinds, num_queries, num_keys):
    """int64 [queries, keys], rectangles that hold a pair; `causal` is bottom-right aligned."""
    times = torch.zeros(num_queries, num_keys, dtype=torch.int64)
    everything = zip(q_ranges.tolist(), k_ranges.tolist(), kinds.tolist(), strict=True)
    for (q0, q1), (k0, k1), kind in everything:
        assert 0 <= q0 < q1 <= num_queries and 0 <= k0 < k1 <= num_keys and kind in (0, 1)
        row, column = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)
        seen = column - (k1 - k0) <= row - (q1 - q0) if kind == 1 else column >= 0
        times[q0:q1, k0:k1] += seen.expand(q1 - q0, k1 - k0)
    return times


# flash_attn.cute.flash_attn_func and what its mask_mod uses, as in tag fa4-v4.0.0.beta27.


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


class Vector:
    """A vector of indices in a kernel: compared and combined; [0] is its first element."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, place):
        assert place == 0
        return self.values

    def __ge__(self, other):
        return self.values >= other.values

    def __lt__(self, other):
        return self.values < other.values


def scalar_to_ssa(value, dtype):
    assert dtype == "Int32" and value.dtype == torch.int32
    return Vector(value)


def flash_attn_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
):
    assert q.shape[0] == k.shape[0] == 1 and not causal and window_size == (None, None)
    num_queries, num_keys = q.shape[1], k.shape[1]
    assert all(x.is_contiguous() and x.dtype == torch.int32 for x in aux_tensors)
    rows, columns = torch.meshgrid(torch.arange(num_queries), torch.arange(num_keys), indexing="ij")
    seen = mask_mod(Vector(0), Vector(0), Vector(rows), Vector(columns), None, aux_tensors)
    visible = blocks(block_sparse_tensors, num_queries, num_keys, seen)
    backward = blocks(block_sparse_tensors_bwd, num_keys, num_queries, seen.T)
    assert torch.equal(visible, backward.T), "the passes compute different masks"
    tensors = (x.squeeze(0) for x in (q, k, v))
    out = attend_formula(*tensors, visible, softmax_scale=softmax_scale)
    return out.unsqueeze(0), None


def blocks(lists, num_rows, num_columns, seen):
    """bool [rows, columns]: full blocks whole, masked blocks as `seen`, the rest hidden."""
    size = lists.block_size
    assert size == (128, 128) and num_rows % 128 == num_columns % 128 == 0
    visible = torch.zeros(num_rows, num_columns, dtype=torch.bool)
    for count, index, is_full in (
        (lists.mask_block_cnt, lists.mask_block_idx, False),
        (lists.full_block_cnt, lists.full_block_idx, True),
    ):
        assert count.dtype == index.dtype == torch.int32
        assert count.shape == (1, 1, num_rows // 128) and index.shape[:3] == count.shape
        for block in range(num_rows // 128):
            for other in index[0, 0, block, : count[0, 0, block]].tolist():
                place = slice(block * 128, block * 128 + 128), slice(other * 128, other * 128 + 128)
                assert not visible[place].any(), "a block is in both lists"
                visible[place] = True if is_full else seen[place]
    return visible


MAGI = {"magi_attention__functional": {"flex_flash_attn_func": flex_flash_attn_func}}

FLASH_4 = {
    "flash_attn__cute": {"flash_attn_func": flash_attn_func},
    "flash_attn__cute__block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
    "flash_attn__cute__utils": {"scalar_to_ssa": scalar_to_ssa},
    "cutlass": {"Int32": "Int32"},
    "cutlass__cute": {"jit": lambda function: function},
}
