import pytest

from megatron_croc.config.run import RunConfig
from megatron_croc.config.settings import Setting, field_docs, settings_of

BY_NAME = {s.name: s for s in settings_of(RunConfig)}


def test_leaf_names_and_flags_are_unique():
    names = [s.name for s in settings_of(RunConfig)]
    assert len(names) == len(set(names))
    # --no-x of a bool must not be another setting's flag.
    flags = {s.flag for s in settings_of(RunConfig)}
    assert not flags & {"--no-" + s.flag[2:] for s in settings_of(RunConfig) if s.is_bool}
    assert not flags & {"--recipe", "--config", "--help", "--world-size", "--dump"}


def test_every_setting_has_a_docstring():
    assert [s.path for s in settings_of(RunConfig) if not s.doc] == []
    assert field_docs(RunConfig)["stage"].startswith("pretrain_mlp")


def test_names_are_megatrons():
    assert BY_NAME["tensor_model_parallel_size"].flag == "--tensor-model-parallel-size"
    assert BY_NAME["freeze_LM"].flag == "--freeze-LM"
    assert BY_NAME["num_layers"].path == "model.language_model.num_layers"


@pytest.mark.parametrize(
    ("name", "texts", "value"),
    [
        ("num_layers", ["4"], 4),
        ("lr", ["2e-5"], 2e-5),
        ("lr", ["1"], 1.0),
        ("bf16", ["off"], False),
        ("kv_channels", ["none"], None),
        ("kv_channels", ["64"], 64),
        ("projector_lr", ["1e-3"], 1e-3),
        ("save", ["12"], "12"),
        ("save", ["none"], None),
        ("assign_mode", ["nearest"], "nearest"),
        ("recompute_granularity", ["none"], "none"),
        ("image_mean", ["0.5", "0.5", "1"], (0.5, 0.5, 1.0)),
        ("data_path", ["a", "7"], ("a", "7")),
        ("data_path", ["none"], ()),
        ("vision_select_layer", ["-2"], -2),
    ],
)
def test_words_become_values(name: str, texts: list[str], value: object):
    converted = BY_NAME[name].from_text(texts)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("num_layers", ["4.5"], "must be an integer, got 4.5"),
        ("num_layers", ["true"], "must be an integer, got 'true'"),
        ("num_layers", [], "takes one value, got none"),
        ("lr", ["nan"], "must be a number, got nan"),
        ("lr", ["inf"], "must be a number, got inf"),
        ("bf16", ["2"], "must be true or false, got 2"),
        ("kv_channels", ["x"], "must be an integer or none, got 'x'"),
        ("assign_mode", ["greedy"], "must be one of hungarian, nearest, got 'greedy'"),
        ("image_mean", ["0.5"], "must be 3 values, each a number, got \\[0.5\\]"),
    ],
)
def test_wrong_words_are_refused_with_what_is_allowed(name: str, texts: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        BY_NAME[name].from_text(texts)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", True), ("num_layers", "4"), ("bf16", 1), ("lr", "fast"), ("save", 3)],
)
def test_yaml_values_are_not_bent(name: str, value: object):
    with pytest.raises(ValueError, match="must be"):
        BY_NAME[name].from_value(value)


def test_expected_is_readable_for_every_setting():
    assert all(isinstance(s, Setting) and s.expected for s in settings_of(RunConfig))
