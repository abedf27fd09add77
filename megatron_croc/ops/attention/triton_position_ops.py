"""Operations of the flip on positions as Triton kernels: one launch each, no intermediate tensors.

One program handles one position of the flipped call: a row [H, d] of its tensors. Offsets of rows
are int64, because row * heads * head dim exceeds 2^31 at 2^19 positions of 32 x 128 heads.

Kernels are not specialised on numbers that change from batch to batch, so they are compiled once.
They use only Triton's builtin functions: its library (tl.sigmoid and others) is compiled when
Triton is imported, and would not run in the interpreter if TRITON_INTERPRET is set later, before
this module is imported. The tests use the interpreter. Not run on a GPU so far.

Only position_ops.py imports this module, and only where Triton is used.
"""

# Triton types kernel arguments (pointers and numbers) at each launch, kernel[grid](...).
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_croc.ops.attention.contract import QKV, FlashOutput
from megatron_croc.ops.attention.torch_position_ops import TORCH_POSITION_OPS
from megatron_croc.ops.flip_plan import CausalCall

_BLOCK = 1024
"""Elements that a program holds at one time; a power of two."""


@triton.jit
def _copy_row(
    source, source_row, stride_row, stride_head, stride_dim,
    target, target_row,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one row [H, d] with strides to one row of a contiguous tensor; WIDTH = H * d."""
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
        position = tl.load(query_rows + row)
        _copy_row(query, position, query_row, query_head, query_dim, query_out, row,
                  QUERY_WIDTH, HEAD_DIM, BLOCK)  # fmt: skip
    if row < num_keys:
        position = tl.load(key_rows + row)
        _copy_row(key, position, key_row, key_head, key_dim, key_out, row,
                  KEY_WIDTH, HEAD_DIM, BLOCK)  # fmt: skip
        _copy_row(value, position, value_row, value_head, value_dim, value_out, row,
                  KEY_WIDTH, HEAD_DIM, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "lse_head"])
def _gather_outputs(
    grad, grad_row, grad_head, grad_dim, grad_out,
    out, out_row, out_head, out_dim, out_out,
    lse, lse_head, lse_row, lse_out,
    rows, num_rows,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(rows + row)
    _copy_row(grad, position, grad_row, grad_head, grad_dim, grad_out, row,
              HEADS * HEAD_DIM, HEAD_DIM, BLOCK)  # fmt: skip
    _copy_row(out, position, out_row, out_head, out_dim, out_out, row,
              HEADS * HEAD_DIM, HEAD_DIM, BLOCK)  # fmt: skip
    head = tl.arange(0, HEADS_BLOCK).to(tl.int64)
    inside = head < HEADS
    found = tl.load(lse + head * lse_head + position * lse_row, mask=inside)
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
    position = tl.load(rows + row)
    dim = tl.arange(0, DIM_BLOCK)
    for first in range(0, HEADS, HEADS_BLOCK):
        head = first + tl.arange(0, HEADS_BLOCK).to(tl.int64)
        is_head = head < HEADS
        lse_at = lse + head * lse_head + position * lse_row
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
        out_at = out + position * out_row + head[:, None] * out_head + dim[None, :] * out_dim
        more_at = more + row * more_row + head[:, None] * more_head + dim[None, :] * more_dim
        before = tl.load(out_at, mask=inside, other=0.0).to(weight.dtype)
        added = tl.load(more_at, mask=inside, other=0.0).to(weight.dtype)
        merged = before + weight[:, None] * (added - before)
        tl.store(out_at, merged.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_row(
    total, total_row, stride_row, stride_head, stride_dim,
    part, part_row,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < WIDTH
        head, dim = column // HEAD_DIM, column % HEAD_DIM
        at = total + total_row * stride_row + head * stride_head + dim * stride_dim
        added = tl.load(part + part_row * WIDTH + column, mask=inside, other=0.0).to(SUM)
        both = tl.load(at, mask=inside, other=0.0).to(SUM) + added
        tl.store(at, both.to(total.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _add_parts(
    query, query_row, query_head, query_dim, query_part,
    key, key_row, key_head, key_dim, key_part,
    value, value_row, value_head, value_dim, value_part,
    query_rows, num_queries, key_rows, num_keys,
    QUERY_WIDTH: tl.constexpr, KEY_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < num_queries:
        position = tl.load(query_rows + row)
        _add_row(query, position, query_row, query_head, query_dim, query_part, row,
                 QUERY_WIDTH, HEAD_DIM, BLOCK, SUM)  # fmt: skip
    if row < num_keys:
        position = tl.load(key_rows + row)
        _add_row(key, position, key_row, key_head, key_dim, key_part, row,
                 KEY_WIDTH, HEAD_DIM, BLOCK, SUM)  # fmt: skip
        _add_row(value, position, value_row, value_head, value_dim, value_part, row,
                 KEY_WIDTH, HEAD_DIM, BLOCK, SUM)  # fmt: skip


class TritonPositionOps:
    """The kernels of this module, as `PositionOps`."""

    name = "triton"

    def gather(self, tensors: QKV, call: CausalCall) -> QKV:
        """See `PositionOps`."""
        if call.queries is None or call.keys is None:
            return TORCH_POSITION_OPS.gather(tensors, call)
        gathered = QKV(
            *(
                x.new_empty(positions.numel(), *x.shape[1:])
                for x, positions in zip(tensors, (call.queries, call.keys, call.keys), strict=True)
            )
        )
        _gather_inputs[_grid(call)](*_arguments(tensors, gathered, call), BLOCK=_BLOCK)
        return gathered

    def merge(self, output: FlashOutput, more: FlashOutput, positions: Tensor) -> None:
        """See `PositionOps`."""
        _, heads, head_dim = output.out.shape
        dim_block = triton.next_power_of_2(head_dim)
        heads_block = min(triton.next_power_of_2(heads), max(1, _BLOCK // dim_block))
        _merge[(positions.numel(),)](
            *(output.out, *output.out.stride(), output.lse, *output.lse.stride()),
            *(more.out, *more.out.stride(), more.lse, *more.lse.stride(), positions),
            HEADS=heads,
            HEADS_BLOCK=heads_block,
            HEAD_DIM=head_dim,
            DIM_BLOCK=dim_block,
        )

    def gather_outputs(
        self, grad: Tensor, output: FlashOutput, positions: Tensor
    ) -> tuple[Tensor, FlashOutput]:
        """See `PositionOps`."""
        (out, lse), number = output, positions.numel()
        _, heads, head_dim = out.shape
        gathered_grad, gathered_out = (x.new_empty(number, heads, head_dim) for x in (grad, out))
        gathered_lse = lse.new_empty(heads, number)
        _gather_outputs[(number,)](
            *(grad, *grad.stride(), gathered_grad, out, *out.stride(), gathered_out),
            *(lse, *lse.stride(), gathered_lse, positions, number),
            HEADS=heads,
            HEADS_BLOCK=triton.next_power_of_2(heads),
            HEAD_DIM=head_dim,
            BLOCK=_BLOCK,
        )
        return gathered_grad, FlashOutput(gathered_out, gathered_lse)

    def add(self, totals: QKV, parts: QKV, call: CausalCall) -> None:
        """See `PositionOps`.

        Keys that two pieces share would be a race between programs; torch adds those.
        """
        if call.queries is None or call.keys is None or not call.keys_are_distinct:
            return TORCH_POSITION_OPS.add(totals, parts, call)
        parts = QKV(*(x.contiguous() for x in parts))
        accumulate = tl.float64 if totals.query.dtype == torch.float64 else tl.float32
        _add_parts[_grid(call)](*_arguments(totals, parts, call), BLOCK=_BLOCK, SUM=accumulate)


def _grid(call: CausalCall) -> tuple[int]:
    return (max(call.num_queries, call.num_keys),)


def _arguments(strided: QKV, contiguous: QKV, call: CausalCall) -> tuple[object, ...]:
    """Arguments of `_gather_inputs` and `_add_parts`, without their block sizes."""
    tensors = (
        argument
        for x, packed in zip(strided, contiguous, strict=True)
        for argument in (x, *x.stride(), packed)
    )
    _, heads, head_dim = strided.query.shape
    widths = (heads * head_dim, strided.key.shape[1] * head_dim, head_dim)
    return (*tensors, call.queries, call.num_queries, call.keys, call.num_keys, *widths)


TRITON_POSITION_OPS = TritonPositionOps()
