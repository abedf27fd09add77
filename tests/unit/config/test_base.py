from pathlib import Path

import pytest

from megatron_croc.config.base import (
    apply_changes,
    as_sections,
    changes_from_tree,
    changes_from_words,
    read_yaml,
    settings_help,
    to_yaml,
)
from megatron_croc.config.run import RunConfig
from megatron_croc.config.settings import get_setting, settings_of
from megatron_croc.errors import ConfigError
from megatron_croc.recipes import get_recipe, list_recipes


def read(line: str) -> tuple[dict[str, object], list[str]]:
    faults: list[str] = []
    return dict(changes_from_words(RunConfig, line.split(), faults)), faults


@pytest.mark.parametrize("name", list_recipes())
def test_yaml_gives_back_an_equal_run(name: str, tmp_path: Path):
    run = get_recipe(name)
    run.data.data_path = ("a", "b=c")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run))
    faults: list[str] = []
    again = RunConfig()
    apply_changes(again, changes_from_tree(RunConfig, read_yaml(path), faults, source="run.yaml"))
    assert faults == []
    assert again == run


def test_a_checkpoint_of_an_earlier_version_is_read():
    tree = {"optimizer": {"optimizer_offload_fraction": 1.0, "lr": 1e-3}}
    faults: list[str] = []
    changes = changes_from_tree(RunConfig, tree, faults, source="run.yaml")
    assert (dict(changes), faults) == ({"optimizer.lr": 1e-3}, [])


def test_every_flag_reaches_its_own_field():
    for setting in settings_of(RunConfig):
        if setting.is_bool:
            changes, faults = read("--no-" + setting.flag[2:])
            assert (changes, faults) == ({setting.path: False}, [])
            changes, faults = read(setting.flag)
            assert (changes, faults) == ({setting.path: True}, [])
        elif not setting.is_tuple:
            value = setting.default if setting.default is not None else "none"
            changes, faults = read(f"{setting.flag} {value}")
            assert (changes, faults) == ({setting.path: setting.default}, [])


def test_flags_and_overrides_in_any_order_and_spelling():
    changes, faults = read(
        "--num-layers=4 optimizer.lr=1e-3 --data-path a runs/b=c --bf16 --image-mean 0.1 0.2 0.3 "
        "data.valid_data_path=x,y --img-size 28"
    )
    assert faults == []
    assert changes == {
        "model.language_model.num_layers": 4,
        "optimizer.lr": 1e-3,
        "data.data_path": ("a", "runs/b=c"),
        "training.bf16": True,
        "model.vision_tower.image_mean": (0.1, 0.2, 0.3),
        "data.valid_data_path": ("x", "y"),
        "model.vision_tower.img_size": 28,
    }


def test_the_last_one_wins():
    assert read("--lr 1 optimizer.lr=2")[0] == {"optimizer.lr": 2.0}


def test_a_negative_number_is_a_value():
    assert read("--vision-select-layer -1")[0] == {"model.vision_tower.vision_select_layer": -1}


def test_all_faults_of_a_command_line_are_reported_at_once():
    _, faults = read(
        "--lrr 3 --lr x --num_layers 4 model.num_layers=3 --data-path a modle.num_layers=3 foo "
        "--assign-mode nerest --micro-batch-size"
    )
    assert faults == [
        "unknown flag --lrr (did you mean --lr?)",
        "--lr must be a number, got 'x'",
        "unknown flag --num_layers (did you mean --num-layers?)",
        "unknown setting model.num_layers (it is model.language_model.num_layers)",
        "unknown setting modle.num_layers (it is model.language_model.num_layers)",
        "unexpected word foo: settings are --flag value or path.to.field=value",
        "--assign-mode must be one of hungarian, nearest, got 'nerest'",
        "--micro-batch-size takes one value, got none",
    ]


def test_all_faults_of_a_yaml_file_are_reported_at_once():
    faults: list[str] = []
    tree = {
        "model": {"language_model": {"num_layer": 4, "num_layers": "four"}, "vision_tower": None},
        "parallel": 3,
        "optimiser": {"lr": 1e-3},
        "lr": 1e-3,
    }
    assert changes_from_tree(RunConfig, tree, faults, source="x.yaml") == {}
    assert faults == [
        "x.yaml: unknown setting model.language_model.num_layer "
        "(did you mean model.language_model.num_layers?)",
        "x.yaml: model.language_model.num_layers must be an integer, got 'four'",
        "x.yaml: parallel is a section and needs settings, got 3",
        "x.yaml: unknown setting optimiser",
        "x.yaml: unknown setting lr (it is optimizer.lr)",
    ]


def test_numbers_without_a_dot_and_empty_files(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 2e-5}\n")
    assert read_yaml(path) == {"optimizer": {"lr": 2e-5}}
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  seed: 1\n  seed: 2\n", ": line 3: seed is given twice"),
        ("training: [", "not YAML"),
        ("- a\n", "must be sections of settings"),
        ("a: !!python/object/apply:os.getcwd []\n", "not YAML"),
        (BOMB, "aliases grow to more than 20,000 values"),
        ("a: &a [*a]\n", "a value holds itself"),
        ("a: " + "[" * 20_000, "nested more than 64 levels"),
        ("a: 2024-99-99\n", "not YAML"),
        ("a: " + "x" * 300_000, "larger than 262,144 bytes"),
    ],
)
def test_files_that_would_be_misread_are_refused(text: str, message: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--config .*gone.yaml: cannot be read"):
        read_yaml(tmp_path / "gone.yaml")


def test_help_names_every_flag_in_its_section():
    lines = settings_help(RunConfig()).splitlines()
    for setting in settings_of(RunConfig):
        heading = lines.index(f"{setting.section or 'run'}:")
        rest = lines[heading + 1 :]
        section = rest[: rest.index("") if "" in rest else None]
        assert any(line.startswith(f"  {setting.flag}") for line in section), setting.flag
        assert f"      {setting.doc}" in section


def test_help_shows_the_values_of_the_given_run():
    run = get_recipe("tiny/finetune")
    run.data.data_path = ("a", "b")
    shown = settings_help(run)
    assert "  --num-layers  [an integer; default 4]\n" in shown
    assert "  --bf16, --no-bf16  [true or false; default false]\n" in shown
    assert "each a text; default a b]\n" in shown


def test_changes_become_sections():
    changes = {"stage": "finetune", "data.data_path": ("a", "b"), "model.prompt_pool.pool_size": 7}
    tree = {
        "stage": "finetune",
        "data": {"data_path": ["a", "b"]},
        "model": {"prompt_pool": {"pool_size": 7}},
    }
    assert as_sections(changes) == tree
    assert changes_from_tree(RunConfig, tree, [], source="") == changes


def test_changes_reach_nested_fields():
    run = RunConfig()
    apply_changes(run, {"stage": "finetune", "model.prompt_pool.pool_size": 7})
    assert run.stage == "finetune"
    assert get_setting(run, "model.prompt_pool.pool_size") == run.model.prompt_pool.pool_size == 7
