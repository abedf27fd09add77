"""The flip's row operations as Triton kernels: one launch each, nothing in between in memory.

A program handles one row of the flipped call, that is all heads of one token. Offsets of rows are
int64: row * heads * head dim passes 2^31 at 2^19 tokens of 32 x 128 heads.

Numbers that change from batch to batch are not specialised on: nothing is compiled anew for them.
Only Triton's builtin functions are used, since its library (tl.sigmoid and the like) is compiled
when Triton is imported: so these kernels run in its interpreter whenever TRITON_INTERPRET is set
before this module is imported. They are tested that way; not run on a GPU so far.

This module is imported by rows.py alone, and only where Triton is wanted.
"""

# Arguments of kernels are pointers and numbers that Triton types at each launch, kernel[grid](...).
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_croc.ops.attention.contract import QKV
from megatron_croc.ops.attention.torch_rows import TORCH_ROWS
from megatron_croc.ops.flip_plan import CausalCall

_BLOCK = 1024
"""Elements a program holds at a time; a power of two."""


@triton.jit
def _copy_row(
    source, source_row, stride_row, stride_head, stride_dim,
    target, target_row,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row [H, d] with strides -> one row of a contiguous tensor, WIDTH = H * d."""
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < WIDTH
        head, dim = column // HEAD_DIM, column % HEAD_DIM
        at = source + source_row * stride_row + head * stride_head + dim * stride_dim
        tl.store(target + target_row * WIDTH + column, tl.load(at, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _gather_inputs(
    query, query_row, query_head, query_dim, query_out,
    key, key_row, key_head, key_dim, key_out,
    value, value_row, value_head, value_dim, value_out,
    query_rows, num_queries, key_rows, num_keys,
    QUERY_WIDTH: tl.constexpr, KEY_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < num_queries:
        taken = tl.load(query_rows + row)
        _copy_row(query, taken, query_row, query_head, query_dim, query_out, row,
                  QUERY_WIDTH, HEAD_DIM, BLOCK)  # fmt: skip
    if row < num_keys:
        taken = tl.load(key_rows + row)
        _copy_row(key, taken, key_row, key_head, key_dim, key_out, row,
                  KEY_WIDTH, HEAD_DIM, BLOCK)  # fmt: skip
        _copy_row(value, taken, value_row, value_head, value_dim, value_out, row,
                  KEY_WIDTH, HEAD_DIM, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "lse_head"])
def _gather_results(
    grad, grad_row, grad_head, grad_dim, grad_out,
    out, out_row, out_head, out_dim, out_out,
    lse, lse_head, lse_row, lse_out,
    rows, num_rows,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    taken = tl.load(rows + row)
    _copy_row(grad, taken, grad_row, grad_head, grad_dim, grad_out, row,
              HEADS * HEAD_DIM, HEAD_DIM, BLOCK)  # fmt: skip
    _copy_row(out, taken, out_row, out_head, out_dim, out_out, row,
              HEADS * HEAD_DIM, HEAD_DIM, BLOCK)  # fmt: skip
    head = tl.arange(0, HEADS_BLOCK).to(tl.int64)
    inside = head < HEADS
    found = tl.load(lse + head * lse_head + taken * lse_row, mask=inside)
    tl.store(lse_out + head * num_rows + row, found, mask=inside)


@triton.jit(do_not_specialize=["lse_head", "more_lse_head"])
def _merge(
    out, out_row, out_head, out_dim,
    lse, lse_head, lse_row,
    more, more_row, more_head, more_dim,
    more_lse, more_lse_head, more_lse_row,
    rows,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    taken = tl.load(rows + row)
    dim = tl.arange(0, DIM_BLOCK)
    for first in range(0, HEADS, HEADS_BLOCK):
        head = first + tl.arange(0, HEADS_BLOCK).to(tl.int64)
        is_head = head < HEADS
        lse_at = lse + head * lse_head + taken * lse_row
        before_lse = tl.load(lse_at, mask=is_head, other=0.0)
        added_lse = tl.load(
            more_lse + head * more_lse_head + row * more_lse_row, mask=is_head, other=0.0
        )
        larger = tl.maximum(before_lse, added_lse)
        before_part = tl.exp(before_lse - larger)
        added_part = tl.exp(added_lse - larger)
        weight = added_part / (before_part + added_part)
        tl.store(lse_at, larger + tl.log(before_part + added_part), mask=is_head)

        inside = is_head[:, None] & (dim < HEAD_DIM)[None, :]
        out_at = out + taken * out_row + head[:, None] * out_head + dim[None, :] * out_dim
        more_at = more + row * more_row + head[:, None] * more_head + dim[None, :] * more_dim
        before = tl.load(out_at, mask=inside, other=0.0).to(weight.dtype)
        added = tl.load(more_at, mask=inside, other=0.0).to(weight.dtype)
        merged = before + weight[:, None] * (added - before)
        tl.store(out_at, merged.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_row(
    total, total_row, stride_row, stride_head, stride_dim,
    share, share_row,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < WIDTH
        head, dim = column // HEAD_DIM, column % HEAD_DIM
        at = total + total_row * stride_row + head * stride_head + dim * stride_dim
        added = tl.load(share + share_row * WIDTH + column, mask=inside, other=0.0).to(SUM)
        both = tl.load(at, mask=inside, other=0.0).to(SUM) + added
        tl.store(at, both.to(total.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _add_shares(
    query, query_row, query_head, query_dim, query_share,
    key, key_row, key_head, key_dim, key_share,
    value, value_row, value_head, value_dim, value_share,
    query_rows, num_queries, key_rows, num_keys,
    QUERY_WIDTH: tl.constexpr, KEY_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < num_queries:
        taken = tl.load(query_rows + row)
        _add_row(query, taken, query_row, query_head, query_dim, query_share, row,
                 QUERY_WIDTH, HEAD_DIM, BLOCK, SUM)  # fmt: skip
    if row < num_keys:
        taken = tl.load(key_rows + row)
        _add_row(key, taken, key_row, key_head, key_dim, key_share, row,
                 KEY_WIDTH, HEAD_DIM, BLOCK, SUM)  # fmt: skip
        _add_row(value, taken, value_row, value_head, value_dim, value_share, row,
                 KEY_WIDTH, HEAD_DIM, BLOCK, SUM)  # fmt: skip


class TritonRows:
    """The kernels above behind the interface of `contract.Rows`."""

    name = "triton"

    def gather(self, inputs: QKV, call: CausalCall) -> QKV:
        """See `Rows`."""
        if call.queries is None or call.keys is None:
            return TORCH_ROWS.gather(inputs, call)
        gathered = QKV(
            *(
                x.new_empty(rows.numel(), *x.shape[1:])
                for x, rows in zip(inputs, (call.queries, call.keys, call.keys), strict=True)
            )
        )
        _gather_inputs[_grid(call)](*_arguments(inputs, gathered, call), BLOCK=_BLOCK)
        return gathered

    def merge(self, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, rows: Tensor) -> None:
        """See `Rows`."""
        _, heads, head_dim = out.shape
        dim_block = triton.next_power_of_2(head_dim)
        heads_block = min(triton.next_power_of_2(heads), max(1, _BLOCK // dim_block))
        _merge[(rows.numel(),)](
            *(out, *out.stride(), lse, *lse.stride()),
            *(more, *more.stride(), more_lse, *more_lse.stride(), rows),
            HEADS=heads,
            HEADS_BLOCK=heads_block,
            HEAD_DIM=head_dim,
            DIM_BLOCK=dim_block,
        )

    def gather_outputs(
        self, grad: Tensor, out: Tensor, lse: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Rows`."""
        _, heads, head_dim = out.shape
        taken_grad, taken_out = (x.new_empty(rows.numel(), heads, head_dim) for x in (grad, out))
        taken_lse = lse.new_empty(heads, rows.numel())
        _gather_results[(rows.numel(),)](
            *(grad, *grad.stride(), taken_grad, out, *out.stride(), taken_out),
            *(lse, *lse.stride(), taken_lse, rows, rows.numel()),
            HEADS=heads,
            HEADS_BLOCK=triton.next_power_of_2(heads),
            HEAD_DIM=head_dim,
            BLOCK=_BLOCK,
        )
        return taken_grad, taken_out, taken_lse

    def add(self, totals: QKV, shares: QKV, call: CausalCall) -> None:
        """See `Rows`; keys that two pieces share would be a race here, torch adds them right."""
        if call.queries is None or call.keys is None or not call.keys_are_distinct:
            return TORCH_ROWS.add(totals, shares, call)
        shares = QKV(*(x.contiguous() for x in shares))
        accumulate = tl.float64 if totals.query.dtype == torch.float64 else tl.float32
        _add_shares[_grid(call)](*_arguments(totals, shares, call), BLOCK=_BLOCK, SUM=accumulate)


def _grid(call: CausalCall) -> tuple[int]:
    return (max(call.num_queries, call.num_keys),)


def _arguments(strided: QKV, contiguous: QKV, call: CausalCall) -> tuple[object, ...]:
    """What `_gather_inputs` and `_add_shares` take alike, up to their block sizes."""
    tensors = (
        argument
        for x, rows in zip(strided, contiguous, strict=True)
        for argument in (x, *x.stride(), rows)
    )
    _, heads, head_dim = strided.query.shape
    widths = (heads * head_dim, strided.key.shape[1] * head_dim, head_dim)
    return (*tensors, call.queries, call.num_queries, call.keys, call.num_keys, *widths)


TRITON_ROWS = TritonRows()
