"""An export computes what the checkpoint computes, and a wrong one is found out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.convert.families import FAMILIES, VOCABULARY, save_family


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Family -> its checkpoint and default export."""
    from megatron_croc.convert.exporting import export_huggingface
    from megatron_croc.convert.importing import import_huggingface

    made: dict[str, tuple[Path, Path]] = {}

    def export(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            llm, vision = save_family(folder, name)
            import_huggingface(llm, folder / "start", vision_folder=vision)
            export_huggingface(folder / "start", folder / "hf")
            made[name] = folder / "start", folder / "hf"
        return made[name]

    return export


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_visual_tokens_agree(family, exported):
    from megatron_croc.inference.verify import verify_export

    report = verify_export(*exported(family))
    assert report.passed
    assert report.largest_difference <= 1e-5 and report.embedding_difference <= 1e-6
    assert report.argmax_agreement == 1.0
    assert report.visual_norms == pytest.approx((1.0,) * 4, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "section", "change"),
    [
        ("qwen2 + siglip", "text_config", dict(rope_theta=10000.0)),
        ("llama3 rope + clip", "text_config", dict(rope_scaling=None)),
        ("vicuna + clip", "text_config", dict(rms_norm_eps=1e-3)),
        ("vicuna + clip", "vision_config", dict(hidden_act="gelu")),
        ("qwen2 + siglip", "vision_config", dict(layer_norm_eps=1e-2)),
        ("qwen2 + siglip", "vision_config", dict(hidden_act="gelu")),
        ("vicuna + clip", "text_config", dict(hidden_act="gelu_pytorch_tanh")),
        ("vicuna + clip", None, dict(vision_feature_layer=-2)),
    ],
)
def test_a_wrong_export_is_found_out(family, section, change, exported, tmp_path):
    import shutil

    from megatron_croc.inference.verify import verify_export

    start, good = exported(family)
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    (config if section is None else config[section]).update(change)
    (bad / "config.json").write_text(json.dumps(config))
    assert not verify_export(start, bad).passed


def test_another_activation_is_refused(exported, tmp_path):
    import shutil

    from megatron_croc.errors import CheckpointError
    from megatron_croc.inference.verify import verify_export

    start, good = exported("vicuna + clip")
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text()) | dict(projector_hidden_act="gelu")
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="export the checkpoint again"):
        verify_export(start, bad)


@pytest.mark.parametrize("family", ["vicuna + clip", "qwen2 + siglip"])
def test_bfloat16_rounds_and_a_wrong_export_does_more(family, exported, tmp_path):
    import shutil

    import torch

    from megatron_croc.inference.verify import verify_export

    start, good = exported(family)
    report = verify_export(start, good, dtype=torch.bfloat16)
    assert report.passed and report.largest_difference > 0.01  # bfloat16 it was
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    config["text_config"]["rope_theta"] = 100.0
    (bad / "config.json").write_text(json.dumps(config))
    assert not verify_export(start, bad, dtype=torch.bfloat16).passed


def test_code_beside_the_weights_is_compared_and_not_run(exported, tmp_path):
    import shutil

    from megatron_croc.errors import CheckpointError
    from megatron_croc.inference.verify import verify_export

    start, good = exported("vicuna + clip")
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    with (bad / "modeling_croc.py").open("a") as file:
        file.write("raise SystemExit('code was run')\n")
    with pytest.raises(CheckpointError, match="is not the code this program exports"):
        verify_export(start, bad)


LOAD = """
import sys, torch, transformers
model, info = transformers.AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
pixels = torch.randn(2, 3, 56, 56)
text = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
image = torch.full((2, 16), model.config.image_token_id)
ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1)
both = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                      max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                       max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
                       use_cache=False)
assert torch.equal(both, plain), "cache"
assert both[:, ids.shape[1]:].max() < int(sys.argv[2]), "a row that is no word"
short = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1, :1], ids[:1, 2:]], dim=1)
row = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids[1:]], dim=1)
batch = torch.cat([short, row])
one = model.generate(input_ids=short[:, 3:], attention_mask=torch.ones_like(short[:, 3:]),
                     pixel_values=pixels[:1], max_new_tokens=8, do_sample=False,
                     eos_token_id=None, pad_token_id=0)
mask = torch.ones_like(batch); mask[0, :3] = 0; mask[1, :2] = 0
padded = model.generate(input_ids=batch, attention_mask=mask, pixel_values=pixels,
                        max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
assert torch.equal(padded[0, -8:], one[0, -8:]), "left padding"
assert torch.equal(padded[1, -8:], both[1, -8:]), "left padding"
"""


@pytest.mark.parametrize("family", ["vicuna + clip", "qwen2 tied + clip"])
def test_transformers_loads_it_and_generates(family, exported):
    """In a process of its own: with the remote code, as a user does it."""
    _, export = exported(family)
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(export), str(VOCABULARY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_training_parts_change_nothing_that_is_computed(exported, tmp_path):
    import torch

    from megatron_croc.convert.export_loader import load_export
    from megatron_croc.convert.exporting import export_huggingface
    from tests.unit.convert.families import read_all

    start, plain = exported("vicuna + clip")
    export_huggingface(start, tmp_path / "hf", training_parts=True)
    more = read_all(tmp_path / "hf").keys() - read_all(plain).keys()
    assert any("token_pool" in name or "mask_token" in name or "pool" in name for name in more)
    with_parts, without = (load_export(f, torch.float32) for f in (tmp_path / "hf", plain))
    ids = torch.tensor([[3, *[without.config.image_token_id] * 16, 4]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, pixel_values=pixels).logits for m in (with_parts, without))
    assert torch.equal(ours, theirs)


def test_the_command(exported, tmp_path, capsys):
    from megatron_croc.cli.convert import main

    start, good = exported("vicuna + clip")
    assert main(["verify", "--load", str(start), "--hf", str(good)]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert main(["export", "--load", str(start), "--to", str(good)]) == 1
    assert "exists already" in capsys.readouterr().err
    for folder in (start, good):
        assert main(["inspect", str(folder)]) == 0
        assert "vision_hidden_size: 32" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 1
