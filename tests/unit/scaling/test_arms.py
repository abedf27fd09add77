import json
import math
from pathlib import Path

import pytest

from megatron_croc.cli.scaling import main
from megatron_croc.errors import ConfigError
from megatron_croc.scaling import arm_launch
from megatron_croc.scaling.arm_launch import ANSWERS, is_finished, launch_arms
from megatron_croc.scaling.arm_report import collect_results, write_arm_report
from megatron_croc.scaling.arms import read_plan

PLAN = """
recipe: tiny
start: start/seed-{seed}
seeds: [1, 2]
settings: {training: {global_batch_size: 8}}
stages:
  pretrain_mlp: {samples: 8}
  pretrain_croc: {samples: 16}
  finetune: {samples: 32}
arms:
  none: {pretrain_croc: null, finetune: {samples: 48}}
  captions: {pretrain_croc: {as: finetune, settings: {model: {attention_mask_type: visual}}}}
  croc: {}
  causal: {pretrain_croc: {settings: {model: {attention_mask_type: causal}}}}
comparisons:
  main: {question: "Does it help?", arms: [none, captions, croc], seeds: [1, 2, 3]}
  mask: {arms: [croc, causal]}
"""


def read(tmp_path: Path, text: str = PLAN):
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    return read_plan(path, tmp_path / "out", data=tmp_path / "data")


def test_arms_are_resolved(tmp_path):
    plan = read(tmp_path)
    order = [(run.arm, run.seed) for run in plan.runs]
    assert order[:4] == [("none", 1), ("captions", 1), ("croc", 1), ("none", 2)]
    assert order[9:] == [("causal", 1), ("causal", 2)]  # croc is there already
    assert {run.num_samples for run in plan.runs} == {56}
    mlp, captions, finetune = plan.run_of("captions", 3).stages
    assert mlp.run.checkpoint.pretrained_checkpoint == str(tmp_path / "data/start/seed-3")
    assert mlp.run.training.seed == 3
    # The captions' shards, trained on as in stage 2, with the mask of stage 1.5.
    assert captions.run.stage == "finetune" and not captions.run.reconstructs
    assert captions.run.data.data_path == (str(tmp_path / "data/shards/pretrain_croc"),)
    assert captions.run.model.attention_mask_type == "visual"
    assert finetune.run.checkpoint.pretrained_checkpoint == str(captions.checkpoints)
    assert finetune.run.model.attention_mask_type == "causal"
    assert finetune.run.training.train_iters == 4


def test_equal_stages_after_equal_stages_are_one_run(tmp_path):
    plan = read(tmp_path)
    none, captions, croc = (plan.run_of(arm, 1).stages for arm in ("none", "captions", "croc"))
    assert none[0] is captions[0] is croc[0]
    assert captions[-1].folder != croc[-1].folder  # equal settings, but other weights before them
    assert plan.run_of("croc", 2).stages[0] is not croc[0]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    {
        "unequal": ("samples: 48", "samples: 40", r"unequal.*\(none 48, captions 56, croc 56\)"),
        "arm": ("arms: [croc, causal]", "arms: [croc, casual]", "no arm casual.*causal"),
        "one arm": ("arms: [croc, causal]", "arms: [croc]", "mask: name two different arms"),
        "an arm twice": ("arms: [croc, causal]", "arms: [croc, croc]", "two different arms"),
        "one seed": ("seeds: [1, 2, 3]", "seeds: [1, 1]", "main: a standard error needs two diff"),
        "a name as seed": ("seeds: [1, 2, 3]", "seeds: [1, a]", "whole numbers, got 'a'"),
        "a number of arms": ("arms: [croc, causal]", "arms: 2", "mask.arms must be a list, got 2"),
        "no mapping": ("  croc: {}", "  croc: 3", "arms.croc must be a mapping, got 3"),
        "no stage": ("none: {pretrain_croc: null", "none: {pretrain_croc: 0", "mapping, got 0"),
        "no comparison": ("  mask: {arms: [croc, causal]}", "  mask:", "mask must be a mapping"),
        "a list": ("  pretrain_mlp: {samples: 8}", "  pretrain_mlp: [8]", "pretrain_mlp must be a"),
        "stage": ("{pretrain_croc: null", "{pretrain_crok: null", "no stage pretrain_crok"),
        "key": ("{as: finetune,", "{ass: finetune,", r"captions.pretrain_croc: unknown key ass"),
        "top": ("seeds: [1, 2]\n", "", "seeds is missing"),
        "batch": ("samples: 16", "samples: 17", "croc.pretrain_croc: samples=17: must be a mult"),
        "setting": ("attention_mask_type: causal", "attention_mask: causal", "attention_mask"),
        "run": ("{global_batch_size: 8}", "{global_batch_size: 8, micro_batch_size: 3}", "seed-1"),
    }.values(),
)
def test_a_fault_is_told_before_anything_starts(tmp_path, before, after, message):
    assert before in PLAN
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, PLAN.replace(before, after))


def write_accuracy(folder: Path, share: float) -> None:
    rows = [
        {"kind": kind, "num_questions": 100, "accuracy": accuracy, "chance": 0.25}
        for kind, accuracy in {"colour": share, "shape": 0.5, "all": share / 2 + 0.25}.items()
    ]
    (folder / "accuracy.json").write_text(json.dumps(rows))


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Commands that were started; each leaves what the real one leaves."""
    started = []
    for stage in ("pretrain_mlp", "pretrain_croc", "finetune"):
        (tmp_path / "data" / "shards" / stage).mkdir(parents=True)
        (tmp_path / "data" / "shards" / f"valid_{stage}").mkdir()
    for name in ("start/seed-1", "start/seed-2", "start/seed-3", "images"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in ("tokenizer.model", "finetune.json", "valid_finetune.json"):
        (tmp_path / "data" / name).touch()

    def run_forked(words, log, *, nice=0):
        started.append(log.parent)
        if words[0] == "generate":
            assert not (log.parent / ANSWERS).exists()
            write_accuracy(log.parent, 0.5)
        else:
            steps = int(Path(words[-1]).read_text().split("train_iters: ")[1].split()[0])
            (log.parent / "checkpoints" / f"iter_{steps:07d}").mkdir(parents=True)
            latest = log.parent / "checkpoints" / "latest_checkpointed_iteration.txt"
            latest.write_text(f"{steps}\n")
        return 0

    monkeypatch.setattr(arm_launch, "run_forked", run_forked)
    return started


def test_each_run_is_started_once_and_after_the_one_before(tmp_path, commands):
    plan = read(tmp_path)
    assert launch_arms(plan, at_once=3) == []
    assert all(map(is_finished, plan.runs))
    assert len(commands) == len(set(commands)) == 3 + 11 + 8 + 11
    for run in plan.runs:
        places = [commands.index(stage.folder) for stage in run.stages]
        assert [*places, commands.index(run.folder)] == sorted(
            [*places, commands.index(run.folder)]
        )
    commands.clear()
    assert launch_arms(plan) == [] and commands == []


def test_a_stopped_launch_goes_on(tmp_path, commands):
    plan = read(tmp_path)
    assert launch_arms(plan, minutes=0) == [] and commands == []
    launch_arms(plan)
    commands.clear()
    run = plan.run_of("croc", 2)
    (run.folder / "accuracy.json").unlink()
    (run.folder / ANSWERS).write_text("half an answ")
    launch_arms(plan)
    assert commands == [run.folder]


@pytest.mark.parametrize(
    "name", ["valid_finetune.json", "shards/valid_pretrain_croc", "start/seed-3"]
)
def test_missing_inputs_are_told_before_anything_starts(tmp_path, commands, name):
    (tmp_path / "data" / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"there is no {name}$"):
        launch_arms(read(tmp_path))
    assert commands == []


def test_other_settings_are_refused(tmp_path, commands):
    launch_arms(read(tmp_path))
    changed = read(tmp_path, PLAN.replace("settings: {", "settings: {optimizer: {lr: 0.5}, "))
    commands.clear()
    with pytest.raises(ConfigError, match="holds a run of other settings; name another --out"):
        launch_arms(changed)
    assert commands == []


def test_a_failed_stage_ends_its_arm_only(tmp_path, commands, monkeypatch):
    fake = arm_launch.run_forked

    def failing(words, log, *, nice=0):
        return 1 if log.parent.match("croc/seed-2/pretrain_croc") else fake(words, log)

    monkeypatch.setattr(arm_launch, "run_forked", failing)
    plan = read(tmp_path)
    assert launch_arms(plan) == ["croc, seed 2"]
    assert [(r.arm, r.seed) for r in plan.runs if not is_finished(r)] == [("croc", 2)]


def test_the_report_by_hand(tmp_path, commands):
    plan = read(tmp_path)
    launch_arms(plan)
    shares = {"none": (0.10, 0.20, 0.30), "captions": (0.11, 0.20, 0.29), "croc": (0.2, 0.31, 0.42)}
    for arm, by_seed in shares.items():
        for seed, share in enumerate(by_seed, start=1):
            write_accuracy(plan.run_of(arm, seed).folder, share)
    last = plan.run_of("none", 1).stages[-1].folder
    (last / "metrics.jsonl").write_text('{"iteration": 6, "valid_text_loss": 0.5}\n')
    for seed in (1, 2, 3):  # a run that diverged
        log = plan.run_of("captions", seed).stages[-1].folder / "metrics.jsonl"
        log.write_text('{"iteration": 4, "valid_text_loss": NaN}\n')
    main_result, mask = collect_results(plan)
    none, captions, croc = main_result.arms
    assert none.accuracy["colour"].value == pytest.approx(0.2)
    assert none.accuracy["colour"].error == pytest.approx(0.1 / math.sqrt(3))
    assert none.differences == {} and none.loss is None  # two seeds have no log
    one = croc.differences["colour"]  # 0.10, 0.11, 0.12
    assert one.value == pytest.approx(0.11) and one.error == pytest.approx(0.01 / math.sqrt(3))
    # Two types and two arms: four tests share the level; the smallest p is multiplied by 4.
    assert croc.adjusted["colour"] == pytest.approx(4 * one.p)
    assert croc.adjusted["all"] == pytest.approx(2 * croc.differences["all"].p)
    assert captions.differences["colour"].value == pytest.approx(0)
    assert list(mask.arms[0].by_seed) == [1, 2]
    page = write_arm_report(tmp_path, [main_result, mask]).read_text()
    assert (
        "| croc | colour | 3 | +11.0 ± 0.6 | +8.5 to +13.5 | 0.003 | 0.011 | significant |" in page
    )
    assert "| captions | all | 3 | +0.0 ± 0.3 |" in page and "| 1.000 | not significant |" in page
    assert "| chance | - | 25.0% | 25.0% | 25.0% | - |" in page
    written = (tmp_path / "comparison.json").read_text()
    assert "NaN" not in written and str(tmp_path) not in written + page
    assert "<svg" in (tmp_path / "main.svg").read_text()


def test_runs_that_are_missing_are_named(tmp_path, commands):
    plan = read(tmp_path)
    with pytest.raises(ConfigError, match="launch first"):
        collect_results(plan)
    launch_arms(plan)
    for arm, seed in (("captions", 3), ("none", 1), ("causal", 2)):
        (plan.run_of(arm, seed).folder / "accuracy.json").unlink()
    (result,) = collect_results(plan)  # only one seed of the masks is left
    assert result.missing == ("none, seed 1", "captions, seed 3")
    none, croc = result.arms  # captions and none share one seed
    assert none.arm == "none" and list(none.by_seed) == [2, 3]
    assert list(croc.by_seed) == [1, 2, 3] and croc.differences["all"].num_seeds == 2
    text = write_arm_report(tmp_path, [result]).read_text()
    assert "Not finished, and so not counted: none, seed 1; captions, seed 3." in text
    assert "| - | - | not tested (under 3 seeds) |" in text and "| significant" not in text


def test_the_command(tmp_path, capsys):
    path = tmp_path / "arms.yaml"
    path.write_text(PLAN)
    words = [str(path), "--out", str(tmp_path / "out")]
    assert main(["plan", *words, "--data", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "- main: Does it help? Arms none, captions, croc; seeds 1, 2, 3.\n" in shown
    assert "| none | 1 | pretrain_mlp 8, finetune 48 | 56 |" in shown
    assert "11 arms, 22 training runs" in shown
    for command, message in {"plan": "--data is not given", "fit": "has arms"}.items():
        assert main([command, *words]) != 0
        assert message in capsys.readouterr().err


def test_a_profile_changes_parts_of_the_file(tmp_path):
    path = tmp_path / "arms.yaml"
    path.write_text(
        PLAN + "profiles: {gpu: {arms: {none: {finetune: {samples: 480}}}, seeds: [7, 8],"
        " stages: {pretrain_croc: {samples: 240}, finetune: {samples: 240}}}}\n"
    )
    plan = read_plan(path, tmp_path / "out", data=tmp_path / "data", profile="gpu")
    assert {run.num_samples for run in plan.runs} == {488}
    assert {run.seed for run in plan.runs if run.arm == "causal"} == {7, 8}
    assert plan.run_of("none", 1).stages[-1].name == "none/seed-1/finetune"  # no stage came back
    assert {run.num_samples for run in read(tmp_path, path.read_text()).runs} == {56}
    with pytest.raises(ConfigError, match=r"there is no profile gpus \(did you mean gpu\?\)"):
        read_plan(path, tmp_path / "out", data=tmp_path / "data", profile="gpus")
    for wrong in ("profiles: 3", "profiles: {gpu: 3}", "profiles: {gpu: {profiles: {}}}"):
        with pytest.raises(ConfigError, match="profiles must be mappings"):
            read(tmp_path, PLAN + wrong)


def test_a_hugging_face_tokenizer_is_a_folder(tmp_path):
    settings = "data: {tokenizer_type: HuggingFaceTokenizer}, training:"
    run = read(tmp_path, PLAN.replace("{training:", "{" + settings, 1)).runs[0]
    assert run.stages[0].run.data.tokenizer_model == str(tmp_path / "data" / "tokenizer")


def test_only_arms_that_exist_are_launched(tmp_path):
    with pytest.raises(ConfigError, match=r"--arms: there is no croq \(did you mean croc\?\)"):
        launch_arms(read(tmp_path), only=["croq"])
