"""Whatever is wrong is said in one line with its name, and nothing is left half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_croc.checkpoint.manifest import write_manifest
from megatron_croc.errors import CheckpointError
from tests.unit.convert.families import read_all, save_family

K_PROJ = "model.layers.2.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A good language model and tower, never changed."""
    return save_family(tmp_path_factory.mktemp("good"), "vicuna + clip")


@pytest.fixture
def source(family, tmp_path) -> Path:
    """A copy of the language model to spoil."""
    return Path(shutil.copytree(family[0], tmp_path / "llm"))


def refused(source: Path, vision: Path | None, tmp_path: Path) -> str:
    """The message of an import that must fail and leave nothing."""
    from megatron_croc.convert.importing import import_huggingface

    with pytest.raises(CheckpointError) as error:
        import_huggingface(source, tmp_path / "out", vision_folder=vision)
    assert not list((tmp_path / "out").glob("*"))
    return str(error.value)


def rewrite(source: Path, change) -> None:
    tensors = read_all(source)
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def spoil_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_tensor(source, family, tmp_path):
    rewrite(source, lambda tensors: tensors.pop(K_PROJ))
    message = refused(source, family[1], tmp_path)
    assert f"tensor {K_PROJ} is missing" in message and "\n" not in message


def test_an_extra_tensor(source, family, tmp_path):
    rewrite(source, lambda tensors: tensors.update({"model.layers.0.gate.weight": torch.ones(2)}))
    message = refused(source, family[1], tmp_path)
    assert message == "tensor model.layers.0.gate.weight belongs to no part of this model"


def test_a_layer_more_than_the_configuration_says(source, family, tmp_path):
    spoil_config(source, num_hidden_layers=3)
    assert "tensor model.layers.3.input_layernorm.weight" in refused(source, family[1], tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.norm.weight", (63,)), (K_PROJ, (48, 64)), ("model.embed_tokens.weight", (120, 64))],
)
def test_a_wrong_shape(source, family, tmp_path, name, shape):
    rewrite(source, lambda tensors: tensors.update({name: torch.ones(shape)}))
    message = refused(source, family[1], tmp_path)
    assert name in message and str(shape[0]) in message and "\n" not in message


def test_a_truncated_file(source, family, tmp_path):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors: truncated: tensor model." in refused(source, family[1], tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    assert "truncated" in refused(source, family[1], tmp_path)


def test_a_header_that_lies(source, family, tmp_path):
    path = source / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[64]', b'"shape":[65]', 1))
    assert "bytes for shape (65,)" in refused(source, family[1], tmp_path)


def test_a_missing_shard(family, tmp_path):
    source = save_family(tmp_path / "cut", "vicuna + clip", max_shard_size="100KB")[0]
    shard = next(source.glob("model-00002-*"))
    shard.unlink()
    assert f"names {shard.name}, which is not beside it" in refused(source, family[1], tmp_path)


class _Code:
    """Unpickled without care it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_not_run(source, family, tmp_path):
    (source / "model.safetensors").unlink()
    trace = tmp_path / "trace"
    torch.save({"model.norm.weight": _Code(trace)}, source / "pytorch_model.bin")
    message = refused(source, family[1], tmp_path)
    assert "can run code" in message and "\n" not in message
    assert not trace.exists()


def test_a_checkpoint_index_with_code_is_not_run(tmp_path):
    import pickle

    from megatron_croc.convert.checkpoint_reader import CheckpointReader

    trace = tmp_path / "trace"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Code(trace)))
    with pytest.raises(CheckpointError, match="does not belong there"):
        CheckpointReader(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="mistral", architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported, only 'silu'"),
        (dict(attention_bias=True), "attention_bias True"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope scaling dynamic"),
        (dict(hidden_size=None), "hidden_size is None"),
    ],
)
def test_a_configuration_that_is_not_supported(source, family, tmp_path, changes, words):
    spoil_config(source, **changes)
    message = refused(source, family[1], tmp_path)
    assert words in message and "config.json" in message and "\n" not in message


def test_a_language_model_alone(source, tmp_path):
    assert "add --vision DIR" in refused(source, None, tmp_path)


@pytest.fixture(scope="module")
def start(family, tmp_path_factory) -> Path:
    """A good checkpoint."""
    from megatron_croc.convert.importing import import_huggingface

    save = tmp_path_factory.mktemp("start") / "save"
    import_huggingface(family[0], save, vision_folder=family[1])
    return save


def test_what_exists_is_not_overwritten(family, start, tmp_path):
    from megatron_croc.convert.exporting import export_huggingface
    from megatron_croc.convert.importing import import_huggingface

    with pytest.raises(CheckpointError, match="has a checkpoint already"):
        import_huggingface(family[0], start, vision_folder=family[1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match=r"out: exists already"):
        export_huggingface(start, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_full_disk_leaves_nothing(family, start, tmp_path, monkeypatch):
    from megatron_croc.convert import checkpoint_writer, exporting, importing

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_sharded", full)
    with pytest.raises(CheckpointError, match=r"hf: cannot be written: .*No space left"):
        exporting.export_huggingface(start, tmp_path / "hf")
    monkeypatch.setattr(checkpoint_writer._Writer, "write_data", full)
    with pytest.raises(CheckpointError, match=r"release: cannot be written: .*No space left"):
        importing.import_huggingface(family[0], tmp_path / "save", vision_folder=family[1])
    assert not list(tmp_path.glob("hf*")) and not list((tmp_path / "save").glob("*"))


def test_a_checkpoint_that_lacks_a_file_or_belongs_to_another_model(start, tmp_path):
    from megatron_croc.convert.exporting import export_huggingface

    damaged = Path(shutil.copytree(start, tmp_path / "damaged"))
    next(damaged.glob("release/*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"is damaged: .*is missing"):
        export_huggingface(damaged, tmp_path / "out")
    other = Path(shutil.copytree(start, tmp_path / "other"))
    config = other / "release" / "run.yaml"
    config.write_text(config.read_text().replace("add_qkv_bias: false", "add_qkv_bias: true"))
    write_manifest(other / "release")
    with pytest.raises(CheckpointError, match=r"linear_qkv\.bias is missing"):
        export_huggingface(other, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        export_huggingface(tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_trainer_refuses_a_model_that_computes_something_else(start, tmp_path):
    from megatron_croc.convert.exporting import export_huggingface, read_run
    from megatron_croc.convert.source import open_weights
    from megatron_croc.errors import ConfigError

    export_huggingface(start, tmp_path / "hf")
    run = read_run(start / "release")
    open_weights(tmp_path / "hf", run.model, reconstructs=run.reconstructs)
    run.model.language_model.rotary_base = 5e5
    run.model.vision_tower.vision_activation = "gelu_tanh"
    with pytest.raises(ConfigError) as error:
        open_weights(tmp_path / "hf", run.model, reconstructs=run.reconstructs)
    assert "rotary_base=500000.0" in str(error.value) and "vision_activation" in str(error.value)
