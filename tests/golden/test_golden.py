"""The training step against recorded runs of the released code, at several layouts.

The comparison itself is megatron_croc/verification/golden; here it is run on every case, and
shown to fail.
"""

import importlib
from pathlib import Path

import pytest

from tests.support.distributed import run_distributed

CASES = (
    "croc/mha_stage15",
    "croc/mha_stage15_2img_1text_CRASH",
    "croc/mha_stage15_all_textonly",
    "croc/mha_stage15_image_plus_textonly",
    "croc/mha_stage1_plain",
    "croc/mha_stage2",
    "victor/stage15",
)

BOUND = 1e-4
"""Largest relative error: fp32 in another order of sums; the worst measured is 7e-6."""

LAYOUTS = {
    "tp2": dict(tp=2, pp=1, sequence_parallel=False),
    "tp2+sp": dict(tp=2, pp=1, sequence_parallel=True),
    "pp2": dict(tp=1, pp=2, sequence_parallel=False),
}


def compare(path: Path, *, tp: int = 1, pp: int = 1, sequence_parallel: bool = False) -> int:
    from megatron_croc.verification.golden.run import run_golden

    return run_golden(path, tp=tp, pp=pp, sequence_parallel=sequence_parallel, bound=BOUND)


@pytest.fixture
def tool():
    """The comparison as a module, to be tampered with."""
    return importlib.import_module("megatron_croc.verification.golden.run")


@pytest.mark.parametrize("case", CASES)
def test_one_process(golden_dir: Path, case: str, capsys):
    status = compare(golden_dir / case)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "PASSED" in printed


def test_no_recorded_case_is_left_out(golden_dir: Path):
    recorded = {
        f"{path.parent.name}/{path.stem}"
        for folder in ("croc", "victor")
        for path in (golden_dir / folder).glob("*.json")
        if not path.stem.startswith("state")
    }
    assert recorded == set(CASES)


def compare_on_ranks(path: str, layout: dict) -> int:
    """One comparison (on each rank)."""
    return compare(Path(path), **layout)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["croc/mha_stage15", "victor/stage15"])
def test_two_processes(golden_dir: Path, case: str, layout: str, capfd):
    statuses = run_distributed(compare_on_ranks, 2, str(golden_dir / case), LAYOUTS[layout])
    assert statuses == [0, 0], capfd.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "model.mask_token",
        "transform_block.layers.0.attention.self.value.bias",
        "model.mm_projector.2.weight",
        "model.layers.3.mlp.up_proj.weight",
    ],
)
def test_one_wrong_gradient_is_a_failure(golden_dir: Path, tool, monkeypatch, capsys, name):
    real = tool.gather_gradients

    def perturbed(models, rules):
        gradients = real(models, rules)
        gradients[name] += 1e-3 * gradients[name].abs().max()
        return gradients

    monkeypatch.setattr(tool, "gather_gradients", perturbed)
    assert compare(golden_dir / "croc/mha_stage15") == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and f"grad {name}" in printed


def test_a_missing_gradient_is_a_failure(golden_dir: Path, tool, monkeypatch, capsys):
    real = tool.gather_gradients

    def without_pool(models, rules):
        gradients = real(models, rules)
        del gradients["model.mask_token"]
        return gradients

    monkeypatch.setattr(tool, "gather_gradients", without_pool)
    assert compare(golden_dir / "croc/mha_stage15") == 1
    assert "grad model.mask_token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        (("model", "attention_mask_type"), "visual", "mask"),
        (("model", "attention_mask_type"), "causal", "mask"),
        (("model", "prompt_pool", "assign_mode"), "hungarian", "pool indices"),
        (("model", "reconstruction", "smooth_l1_beta"), 0.02, "reconstruction loss"),
        (("model", "reconstruction", "reconstruction_loss_weight"), 9.0, "total loss"),
        (("model", "vision_tower", "vision_activation"), "gelu_tanh", "vision features"),
        (("model", "vision_tower", "vision_select_layer"), -3, "vision features"),
        (("model", "language_model", "norm_epsilon"), 1e-3, "logits (real tokens)"),
    ],
)
def test_another_computation_is_a_failure(
    golden_dir: Path, tool, monkeypatch, capsys, setting, value, line
):
    real = tool.build_run

    def other(case, **layout):
        run = real(case, **layout)
        target = run
        for name in setting[:-1]:
            target = getattr(target, name)
        setattr(target, setting[-1], value)
        return run

    monkeypatch.setattr(tool, "build_run", other)
    assert compare(golden_dir / "croc/mha_stage15") == 1
    marked = [text for text in capsys.readouterr().out.splitlines() if text.startswith("  !")]
    assert any(text.endswith(line) or f"  {line}  (" in text for text in marked), marked


def test_a_case_that_is_not_there_is_status_2(tmp_path: Path, capsys):
    assert compare(tmp_path / "nothing") == 2
    assert "nothing.json: no such file" in capsys.readouterr().err
