"""Triton's position kernels in its interpreter, against torch operations and the dense formula."""

import importlib
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_croc.ops.attention import position_ops
from megatron_croc.ops.attention.contract import QKV, FlashOutput
from megatron_croc.ops.attention.dense import attend_formula
from megatron_croc.ops.attention.emulated_flash import EMULATED
from megatron_croc.ops.attention.flip import attend_flip
from megatron_croc.ops.attention.position_ops import choose_position_ops
from megatron_croc.ops.attention.torch_position_ops import TORCH_POSITION_OPS
from megatron_croc.ops.mixed_mask import MixedMask
from tests.support.masks import lay_out, rows

MODULE = "megatron_croc.ops.attention.triton_position_ops"
PACKED = MixedMask.build(
    [0, 1, 10, 17, 20], [(2, 5), (5, 6), (6, 9), (11, 17), (17, 20)], length=24
)
"""A sample of one token, touching spans, a span of one token, whole-sample spans, padding."""


@pytest.fixture(scope="module")
def triton_ops():
    """The kernels as Python: TRITON_INTERPRET counts when the module is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, MODULE, raising=False)
        position_ops._triton_position_ops.cache_clear()
        yield importlib.import_module(MODULE).TRITON_POSITION_OPS
        sys.modules.pop(MODULE)
    position_ops._triton_position_ops.cache_clear()


def draw(length, num_heads, num_groups, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, n, dim) for n in (num_heads, num_groups, num_groups)]
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return QKV(*(x.to(dtype) for x in drawn))


def results(tensors, mask, kernels, plan=None):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    plan = plan or mask.flip
    out = attend_flip(*leaves, plan, softmax_scale=0.3, flash=EMULATED, position_ops=kernels)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, leaves, weight.to(out.dtype))
    return [out.detach(), *grads]


def flat(gathered):
    """Gradient, out and lse of `gather_outputs`."""
    grad, output = gathered
    return grad, *output


@pytest.mark.parametrize(
    ("heads", "dim"), [((1, 1), 8), ((4, 4), 64), ((6, 2), 96), ((3, 1), 128), ((10, 5), 256)]
)
def test_outputs_and_gradients_are_the_formulas(triton_ops, heads, dim):
    tensors = draw(24, *heads, dim)
    ours = results(tensors, PACKED, triton_ops)
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = attend_formula(*leaves, PACKED.visible(), softmax_scale=0.3)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = [expected[:20], *torch.autograd.grad(expected[:20], leaves, weight[:20])]
    for got, formula, bound in zip(ours, expected, (1e-12, 1e-11, 1e-11, 1e-11), strict=True):
        torch.testing.assert_close(got[:20], formula[:20], rtol=0, atol=bound)
        assert (got[20:] == 0).all()


@given(rows, st.sampled_from([(1, 1), (4, 2), (5, 1)]), st.integers(0, 99))
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_rows_are_torchs(triton_ops, row, heads, seed):
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    tensors = draw(length, *heads, 8, seed=seed)
    pairs = zip(
        results(tensors, mask, triton_ops), results(tensors, mask, TORCH_POSITION_OPS), strict=True
    )
    for ours, torchs in pairs:
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_operation_in_low_precision(triton_ops, dtype):
    """Moves are exact; merges and sums differ from torch's by their roundings."""
    call = PACKED.flip.flipped
    inputs, grad = draw(24, 4, 2, 96, dtype), draw(24, 4, 4, 96, dtype, seed=1).query
    lse = torch.randn(4, 24, generator=torch.Generator().manual_seed(2)) * 5
    for ours, torchs in zip(
        triton_ops.gather(inputs, call), TORCH_POSITION_OPS.gather(inputs, call), strict=True
    ):
        assert torch.equal(ours, torchs)
    taken = [
        flat(kernels.gather_outputs(grad, FlashOutput(inputs.query, lse), call.queries))
        for kernels in (triton_ops, TORCH_POSITION_OPS)
    ]
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(*taken, strict=True))

    epsilon = 4 * torch.finfo(dtype).eps
    more = FlashOutput(taken[1][0], taken[1][2] + 1.0)
    merged = []
    for kernels in (triton_ops, TORCH_POSITION_OPS):
        merged.append(FlashOutput(inputs.query.clone(), lse.clone()))
        kernels.merge(merged[-1], more, call.queries)
    torch.testing.assert_close(merged[0][0], merged[1][0], rtol=epsilon, atol=epsilon)
    torch.testing.assert_close(merged[0][1], merged[1][1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(merged[0][0], inputs.query)

    shares = TORCH_POSITION_OPS.gather(QKV(grad, grad[:, :2], grad[:, 2:]), call)
    added = []
    for kernels in (triton_ops, TORCH_POSITION_OPS):
        added.append(QKV(*(x.clone() for x in inputs)))
        kernels.add(added[-1], shares, call)
    for ours, torchs in zip(*added, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=epsilon, atol=epsilon)


def test_strided_tensors(triton_ops):
    """Values come as a slice of a wider projection, gradients with heads before rows."""
    length, call = 24, PACKED.flip.flipped
    wide = torch.randn(length, 4, 32)
    inputs = QKV(wide[..., :8], wide[:, :2, 8:16], wide[:, 1:3, 16:24])
    for ours, torchs in zip(
        triton_ops.gather(inputs, call), TORCH_POSITION_OPS.gather(inputs, call), strict=True
    ):
        assert torch.equal(ours, torchs)
    shares = triton_ops.gather(inputs, call)
    totals = [QKV(*(torch.ones(8, n, length).mT.movedim(0, 2) for n in (4, 2, 2))) for _ in "ab"]
    triton_ops.add(totals[0], shares, call)
    TORCH_POSITION_OPS.add(totals[1], shares, call)
    for ours, torchs in zip(*totals, strict=True):
        torch.testing.assert_close(ours, torchs)
    grad, lse = torch.randn(4, 8, length).permute(2, 0, 1), torch.randn(length, 4).t()
    pairs = (
        flat(kernels.gather_outputs(grad, FlashOutput(inputs.query, lse), call.queries))
        for kernels in (triton_ops, TORCH_POSITION_OPS)
    )
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(*pairs, strict=True))


@pytest.mark.parametrize("gap", [-200.0, -1.0, 0.0, 1.0, 200.0])
def test_a_merge_does_not_overflow(triton_ops, gap):
    merged = []
    for kernels in (triton_ops, TORCH_POSITION_OPS):
        merged.append(FlashOutput(torch.zeros(2, 1, 3), torch.zeros(1, 2)))
        more = FlashOutput(torch.ones(1, 1, 3), torch.full((1, 1), gap))
        kernels.merge(merged[-1], more, torch.tensor([1]))
    for ours, torchs in zip(*merged, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)


def test_a_span_cut_by_chunks_shares_its_keys(triton_ops, monkeypatch):
    """Two chunks of one span add to the same keys, which parallel programs would race for."""
    monkeypatch.setattr(sys.modules[MODULE], "_add_parts", None)
    mask = MixedMask.build([0, 24], [(1, 22)], length=24)
    chunks = [(2, 6), (12, 18)]
    plan = mask.flip_of(chunks)
    assert plan.flipped is not None and not plan.flipped.keys_are_distinct
    assert mask.flip.flipped is not None and mask.flip.flipped.keys_are_distinct
    query, key, value = draw(24, 4, 2, 8)
    held = torch.cat([torch.arange(*chunk) for chunk in chunks])
    tensors = (query[held], key, value)
    pairs = (results(tensors, mask, kernels, plan) for kernels in (triton_ops, TORCH_POSITION_OPS))
    for ours, torchs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-13)


def test_the_choice(triton_ops, monkeypatch):
    x = torch.zeros(1)
    assert choose_position_ops(x) is triton_ops
    monkeypatch.delenv("TRITON_INTERPRET")
    assert choose_position_ops(x) is TORCH_POSITION_OPS


@pytest.mark.parametrize("error", [ImportError("No module named 'triton'"), OSError("no ptxas")])
def test_without_a_working_triton_torch_is_taken_and_the_log_says_why(monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr(position_ops.importlib, "import_module", broken)
    kernels, reason = position_ops._triton_position_ops.__wrapped__(torch.device("cpu"))
    assert kernels is TORCH_POSITION_OPS and str(error) in reason


class Compiler:
    """Stands in for a kernel: compiles it for a GPU with the types of a launch's arguments."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability, self.made = kernel, capability, []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, **blocks):
        triton = importlib.import_module("triton")
        compiler = importlib.import_module("triton.compiler")
        target = importlib.import_module("triton.backends.compiler").GPUTarget
        pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
        values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | blocks
        constants = {p.name: values[p.name] for p in self.kernel.params if p.is_constexpr}
        signature = {
            name: "constexpr"
            if name in constants
            else pointers[value.dtype]
            if isinstance(value, torch.Tensor)
            else "i32"
            for name, value in values.items()
        }
        source = compiler.ASTSource(self.kernel, signature, constexprs=constants)
        self.made.append(triton.compile(source, target=target("cuda", self.capability, 32)))


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(monkeypatch, tmp_path, capability):
    """Down to the binary, which Triton can make without the device."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module = importlib.import_module(MODULE)
    monkeypatch.delitem(sys.modules, MODULE)
    kernels = {}
    for name in ("_gather_inputs", "_gather_outputs", "_merge", "_add_parts"):
        kernels[name] = Compiler(getattr(module, name), capability)
        monkeypatch.setattr(module, name, kernels[name])
    call, inputs = PACKED.flip.flipped, draw(24, 4, 2, 96, torch.bfloat16)
    lse = torch.zeros(4, 24)
    ours = module.TRITON_POSITION_OPS
    shares = ours.gather(inputs, call)
    output = FlashOutput(inputs.query, lse)
    _, more = ours.gather_outputs(inputs.query, output, call.queries)
    ours.merge(output, more, call.queries)
    ours.add(inputs, shares, call)
    for name, kernel in kernels.items():
        assert len(kernel.made) == 1 and "cubin" in kernel.made[0].asm, name
