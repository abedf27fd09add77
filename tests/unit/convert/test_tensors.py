"""Every change of representation: exact both ways, and the interleaving written out by hand."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.convert.tensors import Copy, GroupedQKV, Reshape, Rows, Stack

sizes = st.integers(1, 5)


def number(*shape: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def check_inverse(operation, tensors):
    packed = operation.pack(tensors)
    back = operation.unpack(packed)
    assert len(back) == len(tensors)
    for tensor, other in zip(tensors, back, strict=True):
        assert torch.equal(tensor, other)
    assert torch.equal(operation.pack(back), packed)
    # Nothing is lost or made up.
    everything = torch.cat([tensor.flatten() for tensor in tensors])
    assert torch.equal(packed.flatten().sort().values, everything.sort().values)


@given(sizes, sizes, sizes, st.lists(sizes, max_size=1))
@settings(max_examples=100, deadline=None)
def test_qkv_there_and_back(groups, queries, head_dim, rest):
    operation = GroupedQKV(num_query_groups=groups, queries_per_group=queries, head_dim=head_dim)
    q = number(groups * queries * head_dim, *rest)
    k = number(groups * head_dim, *rest, start=10_000)
    v = number(groups * head_dim, *rest, start=20_000)
    check_inverse(operation, [q, k, v])


@given(sizes, sizes, st.lists(sizes, max_size=2))
@settings(max_examples=50, deadline=None)
def test_stack_copy_and_reshape_there_and_back(parts, rows, rest):
    tensors = [number(rows, *rest, start=1000 * i) for i in range(parts)]
    check_inverse(Stack(parts), tensors)
    check_inverse(Copy(), tensors[:1])
    check_inverse(Reshape((1, 1, rows), (rows,)), [number(rows)])


@given(sizes, st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_rows_drop_the_padding(rows, padding):
    operation = Rows(rows)
    check_inverse(operation, [number(rows, 3)])
    padded = torch.cat([number(rows, 3), torch.zeros(padding, 3, dtype=torch.int64)])
    assert torch.equal(operation.unpack(padded)[0], number(rows, 3))


def test_qkv_order_by_hand():
    """Two groups of two queries, heads of one row: each group is its queries, its key, its value.

    As megatron's SelfAttention splits it: [groups, (queries + 2) * head_dim].
    """
    operation = GroupedQKV(num_query_groups=2, queries_per_group=2, head_dim=1)
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    assert operation.pack([q, k, v]).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_gate_stands_above_up():
    gate, up = torch.zeros(2, 3), torch.ones(2, 3)
    assert Stack().pack([gate, up])[:, 0].tolist() == [0, 0, 1, 1]
