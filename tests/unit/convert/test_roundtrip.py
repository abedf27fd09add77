"""Hugging Face -> megatron-core at any layout -> Hugging Face, bit for bit, for every family."""

from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run
from tests.unit.convert.families import FAMILIES, VOCABULARY, read_all, save_family

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "pp2 vpp2": (
        2,
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "tp2 pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Family -> its two directories and the checkpoint imported from them."""
    from megatron_croc.convert.importing import import_huggingface

    made: dict[str, tuple[Path, Path, Path]] = {}

    def start(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            llm, vision = save_family(folder, name, max_shard_size="100KB")
            import_huggingface(llm, folder / "start", vision_folder=vision)
            made[name] = llm, vision, folder / "start"
        return made[name]

    return start


def export(checkpoint: Path, out: Path, layout: str, *, training_parts: bool = True) -> dict:
    from megatron_croc.convert.exporting import export_huggingface

    export_huggingface(
        checkpoint, out, layout=layout, training_parts=training_parts, max_shard_bytes=200_000
    )
    return read_all(out)


def check_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, started, tmp_path):
    """Start -> release -> import -> default export -> import -> release: the same tensors."""
    from megatron_croc.convert.importing import import_huggingface

    llm, vision, start = started(family)
    first = export(start, tmp_path / "release", "release")
    for name, tensor in read_all(llm).items():
        assert torch.equal(first.pop(name), tensor), name
    prefix, used = "model.vision_tower.vision_tower.vision_model.", 0
    for name, tensor in read_all(vision).items():
        mine = first.pop(prefix + name.removeprefix("vision_model."), None)
        used += mine is not None
        assert mine is None or torch.equal(mine, tensor), name
    assert used == (37 if "clip" in family else 35)  # two layers of 16, and the embeddings
    parts = {name.split(".")[1] if name.startswith("model.") else "head" for name in first}
    assert parts == {"mm_projector", "head", "mask_token" if "llama" in family
                     or "vicuna" in family else "token_pool"}  # fmt: skip

    import_huggingface(tmp_path / "release", tmp_path / "whole")
    check_equal(
        export(tmp_path / "whole", tmp_path / "again", "release"), read_all(tmp_path / "release")
    )
    export(tmp_path / "whole", tmp_path / "croc", "croc")
    import_huggingface(tmp_path / "croc", tmp_path / "from croc")
    check_equal(
        export(tmp_path / "from croc", tmp_path / "last", "release"),
        read_all(tmp_path / "release"),
    )


def save_at(layout: dict, start: str, save: str) -> None:
    """Take weights (a checkpoint's or a Hugging Face directory's) and save them (on each rank)."""
    from pathlib import Path

    from megatron_croc.convert.exporting import find_checkpoint, read_run
    from megatron_croc.convert.source import is_huggingface, open_source, open_weights
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_training_state
    from tests.support.checkpoints import save_checkpoint

    run = tiny_run("pretrain_croc", pretrained_checkpoint=start, save=save, **layout)
    from_hf = is_huggingface(start)
    run.model = (
        open_source(Path(start)).model if from_hf else read_run(find_checkpoint(Path(start))).model
    )
    pg = start_distributed(run.parallel, seed=1)
    weights = open_weights(start, run.model, reconstructs=True) if from_hf else None
    training = build_training_state(run, pg, train_iters=10, weights=weights)
    save_checkpoint(run, training.state, training.chunks, training.optimizer, pg)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["vicuna + clip", "qwen2 tied + clip"])
def test_any_layout_is_exported_as_it_was_imported(family, layout, started, tmp_path):
    world_size, changes = LAYOUTS[layout]
    *_, start = started(family)
    expected = export(start, tmp_path / "expected", "release")
    run_distributed(save_at, world_size, changes, str(start), str(tmp_path / "saved"))
    check_equal(export(tmp_path / "saved", tmp_path / "hf", "release"), expected)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["one", "tp2", "pp2 vpp2"])
@pytest.mark.parametrize("form", ["release", "croc"])
def test_the_trainer_takes_a_hugging_face_directory(form, layout, started, tmp_path):
    world_size, changes = LAYOUTS[layout]
    *_, start = started("vicuna + clip")
    export(start, tmp_path / "source", form)
    run_distributed(save_at, world_size, changes, str(tmp_path / "source"), str(tmp_path / "saved"))
    check_equal(export(tmp_path / "saved", tmp_path / "hf", form), read_all(tmp_path / "source"))


def test_bin_files_and_float16_come_back_unchanged(started, tmp_path):
    from megatron_croc.convert.importing import import_huggingface

    llm, vision, _ = started("vicuna + clip")
    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_bytes((llm / "config.json").read_bytes())
    half = {name: tensor.half() for name, tensor in read_all(llm).items()}
    half["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(half, source / "pytorch_model.bin")
    import_huggingface(source, tmp_path / "start", vision_folder=vision)
    back = export(tmp_path / "start", tmp_path / "out", "release", training_parts=False)
    for name, tensor in half.items():
        assert "inv_freq" in name or torch.equal(back[name], tensor), name
    assert back["model.mm_projector.0.weight"].dtype == torch.float16
    assert len(back["lm_head.weight"]) == VOCABULARY


def test_what_is_drawn_fresh_is_what_the_trainer_draws(started, pg_collection):
    from megatron_croc.convert.checkpoint_reader import CheckpointReader
    from megatron_croc.convert.exporting import read_run
    from megatron_croc.training.build import build_model

    *_, start = started("vicuna + clip")
    run, reader = read_run(start / "release"), CheckpointReader(start / "release")
    run.stage, run.training.bf16 = "pretrain_croc", False
    (model,) = build_model(run, pg_collection)
    assert torch.equal(reader.read("prompt_pool.weight"), model.prompt_pool.weight)
    weight = model.projector.encoder.linear_fc1.weight
    assert torch.equal(reader.read("projector.encoder.linear_fc1.weight"), weight)
