"""FlashAttention 4 and MagiAttention: their arguments, evaluated densely, are the mask."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.errors import ConfigError
from megatron_croc.ops.attention import attend, backends, fa4, ffa, measured, packages
from megatron_croc.ops.attention.dense import attend_formula
from megatron_croc.ops.mixed_mask import MixedMask
from tests.support.fake_kernels import FLASH_4, MAGI, count_pairs, install
from tests.support.masks import lay_out, rows
from tests.unit.ops.test_attention import MASKS, draw

LONG = MixedMask.build([0, 300, 301, 900], [(20, 290), (300, 301), (310, 600)], length=1100)
"""Full blocks, masked blocks and padding, past one length bucket."""

CHUNKS = ((0, 4), (6, 9))


@pytest.fixture(params=["ffa", "fa4"])
def backend(request, monkeypatch):
    install(monkeypatch, **(MAGI if request.param == "ffa" else FLASH_4))
    able = {"unsupported_reason": lambda _: None}
    changed = backends._BACKENDS[request.param].__class__(
        backends._BACKENDS[request.param].attend, **able
    )
    monkeypatch.setitem(backends._BACKENDS, request.param, changed)
    return request.param


@pytest.mark.parametrize("name", [*MASKS, "long"])
def test_outputs_and_gradients_are_the_formulas(name, backend):
    mask = MASKS.get(name, LONG)
    n = mask.bounds[-1]
    ours, reference = (draw(4, 2, length=mask.length) for _ in range(2))
    out = attend(*ours, mask, softmax_scale=0.3, backend=backend)
    expected = attend_formula(*reference, mask.visible(), softmax_scale=0.3)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:n], expected[:n], rtol=1e-11, atol=1e-12)
    out[:n].square().sum().backward()
    expected[:n].square().sum().backward()
    for tensor, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_the_chunks_of_a_context_parallel_rank(backend):
    for name in ("packed", "prefix", "images"):
        query, key, value = draw(4, 2)
        mask = MASKS[name]
        mine = torch.cat([torch.arange(begin, end) for begin, end in CHUNKS])
        out = attend(
            query[mine], key, value, mask, softmax_scale=0.3, backend=backend, chunks=CHUNKS
        )
        expected = attend_formula(query, key, value, mask.visible(), softmax_scale=0.3)
        torch.testing.assert_close(out, expected[mine], rtol=1e-12, atol=1e-12)


def test_a_mask_is_not_mistaken_for_the_one_before(backend):
    tensors = draw(2, 2)
    for name in ("causal", "prefix", "causal", "images", "prefix"):
        mask = MASKS[name]
        ours = attend(*tensors, mask, softmax_scale=1.0, backend=backend)
        expected = attend_formula(*tensors, mask.visible(), softmax_scale=1.0)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(rows, st.data())
def test_rectangles_hold_each_visible_pair_once(row, data):
    cu, spans, length = lay_out(*row)
    mask = MixedMask.build(cu, spans, length=length)
    visible = mask.visible()
    visible[cu[-1] :, cu[-1] :] = torch.ones(length - cu[-1], length - cu[-1]).tril().bool()
    found = ffa.rectangles(mask)
    assert torch.equal(count_pairs(*found, length, length), visible.long())
    cuts = sorted(data.draw(st.lists(st.integers(0, length), min_size=4, max_size=4)))
    chunks = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
    mine = [position for begin, end in chunks for position in range(begin, end)]
    found = ffa.rectangles(mask, tuple(chunks))
    assert torch.equal(count_pairs(*found, len(mine), length), visible[mine].long())


def gpu_query(dtype=torch.bfloat16, dim=128):
    return SimpleNamespace(is_cuda=True, device="cuda:0", dtype=dtype, shape=(8, 2, dim))


@pytest.mark.parametrize("module", [fa4, ffa])
def test_reasons_against_a_backend_are_one_line(module, monkeypatch):
    monkeypatch.setattr(packages, "capability", lambda _: (9, 0))
    monkeypatch.setattr(ffa, "capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fa4, "flash_4_unsupported_reason", lambda query: None)
    name = module.DISTRIBUTION
    missing = "flash_attn.cute" if module is fa4 else "magi_attention.functional"
    assert f"{missing} cannot be imported" in module.unsupported_reason(gpu_query())
    monkeypatch.setattr(module, "missing", lambda _: None)
    monkeypatch.setattr(packages, "version", lambda _: "0.9.1")
    packages.too_old.cache_clear()
    assert f"{name} 0.9.1 is too old, " in module.unsupported_reason(gpu_query())
    packages.too_old.cache_clear()
    monkeypatch.setattr(packages, "version", lambda _: "4.0.0b27" if module is fa4 else "1.1.1")
    assert module.unsupported_reason(gpu_query()) is None
    packages.too_old.cache_clear()


def test_ffa_takes_hopper_and_its_dtypes_and_head_dims(monkeypatch):
    monkeypatch.setattr(ffa, "missing", lambda _: None)
    monkeypatch.setattr(ffa, "too_old", lambda _: None)
    monkeypatch.setattr(ffa, "capability", lambda _: (9, 0))
    assert ffa.unsupported_reason(gpu_query()) is None
    assert "float16 or bfloat16" in ffa.unsupported_reason(gpu_query(torch.float32))
    assert "head dim 192" in ffa.unsupported_reason(gpu_query(dim=192))
    monkeypatch.setattr(ffa, "capability", lambda _: (10, 0))
    assert "(9, 0) (Hopper) is needed" in ffa.unsupported_reason(gpu_query())


@pytest.mark.parametrize("name", ["fa4", "ffa"])
def test_a_forced_backend_on_a_cpu_is_refused_in_one_line(name):
    with pytest.raises(
        ConfigError, match=f"{name} cannot run here: .*cpu, CUDA is needed"
    ) as error:
        attend(*draw(1, 1), MASKS["causal"], softmax_scale=1.0, backend=name)
    assert "\n" not in str(error.value)


# The measured table.


def timed(contender, milliseconds, length=2048, *, mask="visual", error=1.0):
    return {
        **{"contender": contender, "milliseconds": milliseconds, "length": length, "mask": mask},
        **{"row": "one sample", "heads": "mha", "direction": "forward+backward"},
        "relative_error": error,
    }


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured._table.cache_clear()
    measured.choose.cache_clear()
    yield tmp_path
    measured._table.cache_clear()
    measured.choose.cache_clear()


NAMES = ("flip", "flex", "dense", "ffa")


def test_unmeasured_the_order_is_kept_and_called_so(cache):
    for _ in range(2):
        name, reason = measured.choose(NAMES, "NVIDIA H100", 128, 4096)
        assert name == "flip" and "unmeasured" in reason
        measured.write_table("NVIDIA H100", 64, [timed("ffa", 1.0)])  # another head dim


def test_the_fastest_at_the_nearest_length_is_taken(cache):
    rows = [timed("flip", 2.0), timed("ffa", 3.0), timed("sdpa + mask", 0.1)]
    rows += [timed("flip", 20.0, 8192), timed("ffa", 10.0, 8192), timed("flex", 15.0, 8192)]
    rows += [timed("flip", 1.0, 8192, mask="prefix"), timed("ffa", 2.0, 8192, mask="prefix")]
    measured.write_table("NVIDIA H100", 128, rows)
    assert measured.choose(NAMES, "NVIDIA H100", 128, 1000)[0] == "flip"
    name, reason = measured.choose(NAMES, "NVIDIA H100", 128, 7000)
    assert name == "ffa"
    assert (
        reason == "6.00 ms at 8192 positions, measured beside flip 10.50; unmeasured: flex, dense"
    )
    assert measured.choose(NAMES[:3], "NVIDIA H100", 128, 7000)[0] == "flip"  # ffa was removed
    assert "unmeasured" in measured.choose(NAMES, "NVIDIA H200", 128, 7000).reason


def test_a_backend_that_computes_something_else_is_not_kept(cache):
    wrong = [timed("ffa", 0.1, error=900.0), timed("ffa", 0.1, 8192)]
    unchecked = {key: value for key, value in timed("flex", 0.1).items() if key != "relative_error"}
    measured.write_table("NVIDIA H100", 128, [timed("flip", 2.0), *wrong, unchecked])
    assert measured.choose(NAMES, "NVIDIA H100", 128, 2048)[0] == "flip"


@pytest.mark.parametrize("text", ["{", "[1]", '{"128": [{"contender": 3}]}', '{"x": []}'])
def test_a_file_that_is_no_table_is_named_and_passed_over(cache, text, monkeypatch):
    said = []
    monkeypatch.setattr(measured, "log_once", lambda _, level, *args: said.append(args))
    file = measured.table_file("NVIDIA H100")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert "unmeasured" in measured.choose(NAMES, "NVIDIA H100", 128, 2048).reason
    assert len(said) == 1 and str(file) in said[0][0] % said[0][1:]
    measured.write_table("NVIDIA H100", 128, [timed("flip", 2.0)])
    assert list(json.loads(file.read_text())) == ["128"]


def test_auto_asks_the_table_on_a_gpu_and_says_what_it_took(cache, monkeypatch):
    said = []
    monkeypatch.setattr(
        backends, "log_once", lambda _, level, *args: said.append(args[0] % args[1:])
    )
    monkeypatch.setattr(backends, "gpu_name", lambda _: "NVIDIA H100")
    for name in backends._BACKENDS:
        reason = "it is not installed" if name in ("fa4", "ffa") else None
        changed = backends._Backend(backends._BACKENDS[name].attend, lambda _, r=reason: r)
        monkeypatch.setitem(backends._BACKENDS, name, changed)
    assert backends.choose_backend("auto", gpu_query()) == "flip"
    assert "attention backend: flip (the first that can run; unmeasured on this GPU)" in said
    measured.write_table("NVIDIA H100", 128, [timed("flip", 2.0), timed("flex", 1.0)])
    assert backends.choose_backend("auto", gpu_query()) == "flex"
    assert said[-1].startswith("attention backend: flex (1.00 ms at 2048 positions, measured")
