"""A comparison of arms as one YAML file: each arm is a sequence of stages, repeated over seeds.

recipe: tiny                          # without its stage
settings: {...}                       # of every stage, as in a --config file
start: starts/seed-{seed}             # optional; initial weights of the first stage, below --data
seeds: [1, 2, 3]
stages:                               # in their order
  pretrain_croc: {samples: 3200, settings: {...}}
  finetune: {samples: 6400}
arms:                                 # what differs from `stages`
  croc: {}
  captions: {pretrain_croc: {as: finetune}}              # the captions, trained on as stage 2 does
  none: {pretrain_croc: null, finetune: {samples: 9600}}      # null: left out
comparisons:
  main: {question: Does stage 1.5 help?, arms: [none, captions, croc], seeds: [1, 2, 3, 4, 5]}
profiles:                             # optional; what differs in another size of the whole file
  gpu: {stages: {pretrain_croc: {samples: 64000}, finetune: {samples: 64000}}}

The first arm of a comparison is its reference: the others are compared with it, seed by seed. All
arms of a comparison must see equally many samples. Stages of equal settings after equal stages are
one run, which their arms share.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_croc.config.base import (
    apply_changes,
    changes_from_tree,
    nearest,
    raise_faults,
    read_yaml,
    to_yaml,
)
from megatron_croc.config.checks import find_faults
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.recipes import get_recipe

_KEYS = ("recipe", "settings", "start", "seeds", "stages", "arms", "comparisons", "profiles")
_NEEDED = ("recipe", "seeds", "stages", "arms", "comparisons")
_STAGE_KEYS = ("samples", "settings", "as")
_COMPARISON_KEYS = ("question", "arms", "seeds")


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One training run: a stage of one arm and seed, or of several arms that share it."""

    name: str
    """Arm, seed and stage; also its folder below `runs`."""

    folder: Path
    run: RunConfig

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self.folder / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One arm with one seed: its stages, then the answers to the held-out questions."""

    arm: str
    seed: int
    folder: Path
    """Gets answers.jsonl and accuracy.json."""

    stages: tuple[StageRun, ...]

    @property
    def num_samples(self) -> int:
        """Samples seen in all stages, repeats included."""
        return sum(samples_of(stage.run) for stage in self.stages)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms that answer one question; the first one is the reference."""

    name: str
    question: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All comparisons, and the runs of their arms in the order of running."""

    comparisons: list[Comparison]
    runs: list[ArmRun]
    data: Path

    def run_of(self, arm: str, seed: int) -> ArmRun:
        """Run of one arm with one seed."""
        return next(r for r in self.runs if (r.arm, r.seed) == (arm, seed))


def samples_of(run: RunConfig) -> int:
    """Return the number of samples that a run sees, repeats included."""
    return (run.training.train_iters or 0) * run.training.global_batch_size


def markdown_of_plan(plan: Plan) -> str:
    """Write all comparisons and runs as Markdown."""
    lines = []
    for one in plan.comparisons:
        seeds = ", ".join(map(str, one.seeds))
        lines.append(f"- {one.name}: {one.question} Arms {', '.join(one.arms)}; seeds {seeds}.")
    lines += ["", "| arm | seed | samples of each stage | in all |", "|---|---|---|---|"]
    for arm in plan.runs:
        samples = ", ".join(f"{s.name.split('/')[-1]} {samples_of(s.run):,}" for s in arm.stages)
        lines.append(f"| {arm.arm} | {arm.seed} | {samples} | {arm.num_samples:,} |")
    stages = {stage.name for arm in plan.runs for stage in arm.stages}
    lines += ["", f"{len(plan.runs)} arms, {len(stages)} training runs (equal ones are shared)."]
    return "\n".join(lines)


def is_plan_of_arms(path: Path) -> bool:
    """Return True for a file of this form; a grid of `scaling/grid.py` has no arms."""
    return "arms" in read_yaml(path)


def read_plan(path: Path, out: Path, *, data: Path, profile: str | None = None) -> Plan:
    """Resolve and check every run.

    Args:
        path: the YAML file.
        out: runs go under `out`/runs.
        data: folder with shards/STAGE, shards/valid_STAGE, tokenizer.model (or the folder
            tokenizer, where the settings have `tokenizer_type: HuggingFaceTokenizer`), and for the
            answers valid_finetune.json, finetune.json and images.
        profile: one of the file's `profiles`; None: the file as it stands.

    Raises:
        ConfigError: has every fault of the file and of every run, a line each.
    """
    tree = _of_profile(read_yaml(path), profile, source=str(path))
    faults = list(_form_faults(tree, str(path)))
    raise_faults(faults)
    comparisons = [
        Comparison(
            name=name,
            question=str(entry.get("question", name)),
            arms=tuple(entry["arms"]),
            seeds=tuple(entry.get("seeds") or tree["seeds"]),
        )
        for name, entry in tree["comparisons"].items()
    ]
    shared: dict[tuple[str, Path | None], StageRun] = {}
    runs: dict[tuple[str, int], ArmRun] = {}
    for comparison in comparisons:
        for seed in comparison.seeds:
            for arm in comparison.arms:
                if (arm, seed) not in runs:
                    stages = _stages(tree, arm, seed, out, data, shared, faults, source=str(path))
                    runs[arm, seed] = ArmRun(
                        arm=arm,
                        seed=seed,
                        folder=out / "runs" / arm / f"seed-{seed}",
                        stages=tuple(stages),
                    )
    for stage in shared.values():
        faults += [f"{stage.name}: {fault}" for fault in find_faults(stage.run, 1)]
    plan = Plan(comparisons=comparisons, runs=list(runs.values()), data=data)
    raise_faults(list(dict.fromkeys(faults)) or list(_unequal(plan, str(path))))
    return plan


def _of_profile(tree: dict[str, Any], profile: str | None, *, source: str) -> dict[str, Any]:
    """Return the file's tree with the values of one profile in place of its own."""
    profiles = tree.get("profiles") or {}
    if not isinstance(profiles, dict) or not all(
        isinstance(one, dict) and "profiles" not in one for one in profiles.values()
    ):
        raise ConfigError(f"{source}: profiles must be mappings of the file's other keys")
    if profile is None:
        return tree
    if profile not in profiles:
        raise ConfigError(f"{source}: there is no profile {profile}{nearest(profile, profiles)}")
    return _merged(tree, profiles[profile])


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a tree with some of its values replaced, at any depth."""
    result = dict(tree)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merged(old, value)
        result[key] = value
    return result


def _form_faults(tree: dict[str, Any], source: str) -> Iterator[str]:
    """Find keys that are unknown, missing, or name what is not there."""
    yield from (f"{source}: unknown key {k}{nearest(k, _KEYS)}" for k in tree if k not in _KEYS)
    missing = [key for key in _NEEDED if not tree.get(key)]
    yield from (f"{source}: {key} is missing" for key in missing)
    if missing:
        return
    faults = list(_kind_faults(tree))
    yield from (f"{source}: {fault}" for fault in faults)
    if faults:
        return
    for arm, changes in {"stages": tree["stages"], **tree["arms"]}.items():
        for stage, entry in (changes or {}).items():
            if stage not in tree["stages"]:
                known = nearest(stage, tree["stages"])
                yield f"{source}: arms.{arm}: there is no stage {stage}{known}"
            for key in entry or {}:
                if key not in _STAGE_KEYS:
                    known = nearest(key, _STAGE_KEYS)
                    yield f"{source}: {arm}.{stage}: unknown key {key}{known}"
    for name, comparison in tree["comparisons"].items():
        for key in comparison:
            if key not in _COMPARISON_KEYS:
                known = nearest(key, _COMPARISON_KEYS)
                yield f"{source}: comparisons.{name}: unknown key {key}{known}"
        arms = comparison.get("arms") or []
        if len(set(arms)) < max(2, len(arms)):
            yield f"{source}: comparisons.{name}: name two different arms or more, each once"
        for arm in arms:
            if arm not in tree["arms"]:
                known = nearest(str(arm), tree["arms"])
                yield f"{source}: comparisons.{name}: there is no arm {arm}{known}"
        if len(set(comparison.get("seeds") or tree["seeds"])) < 2:
            yield f"{source}: comparisons.{name}: a standard error needs two different seeds"


def _kind_faults(tree: dict[str, Any]) -> Iterator[str]:
    """Find values of another kind than the form has there."""
    expected: dict[str, tuple[Any, type]] = {
        "recipe": (tree["recipe"], str),
        "seeds": (tree["seeds"], list),
        **{key: (tree[key], dict) for key in ("stages", "arms", "comparisons")},
    }
    for group in ("stages", "arms", "comparisons"):
        if isinstance(tree[group], dict):
            expected |= {
                f"{group}.{name}": (value, dict)
                for name, value in tree[group].items()
                if value is not None or group == "comparisons"
            }
    for arm, changes in (tree["arms"] if isinstance(tree["arms"], dict) else {}).items():
        if isinstance(changes, dict):
            expected |= {f"arms.{arm}.{k}": (v, dict) for k, v in changes.items() if v is not None}
    for name, one in (tree["comparisons"] if isinstance(tree["comparisons"], dict) else {}).items():
        if isinstance(one, dict):
            expected |= {
                f"comparisons.{name}.{key}": (one[key], list)
                for key in ("arms", "seeds")
                if one.get(key) is not None
            }
    seeds = [value for place, (value, _) in expected.items() if place.endswith("seeds")]
    names = {dict: "a mapping", list: "a list", str: "a name"}
    for place, (value, kind) in expected.items():
        if not isinstance(value, kind):
            yield f"{place} must be {names[kind]}, got {value!r:.60}"
    for seed in (seed for values in seeds if isinstance(values, list) for seed in values):
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            yield f"seeds must be whole numbers, got {seed!r:.60}"


def _unequal(plan: Plan, source: str) -> Iterator[str]:
    """Find comparisons whose arms see different numbers of samples."""
    for comparison in plan.comparisons:
        seed = comparison.seeds[0]
        seen = {arm: plan.run_of(arm, seed).num_samples for arm in comparison.arms}
        if len(set(seen.values())) > 1:
            counts = ", ".join(f"{arm} {number}" for arm, number in seen.items())
            yield (
                f"{source}: comparisons.{comparison.name}: arms see unequal numbers of samples "
                f"({counts}); change the samples of a stage"
            )


def _stages(
    tree: dict[str, Any],
    arm: str,
    seed: int,
    out: Path,
    data: Path,
    shared: dict[tuple[str, Path | None], StageRun],
    faults: list[str],
    *,
    source: str,
) -> Iterator[StageRun]:
    """Resolve the stages of one arm and seed; stages that another arm has already are shared."""
    changes = tree["arms"][arm] or {}
    previous: StageRun | None = None
    for name, base in tree["stages"].items():
        if name in changes and changes[name] is None:
            continue
        try:
            run = _resolve(tree, name, [base or {}, changes.get(name) or {}], faults, source=source)
        except ConfigError as error:
            faults.append(f"{source}: {arm}.{name}: {error}")
            continue
        run.training.seed = seed
        run.data.data_path = (str(data / "shards" / name),)
        run.data.valid_data_path = (str(data / "shards" / f"valid_{name}"),)
        is_file = run.data.tokenizer_type == "SentencePieceTokenizer"
        run.data.tokenizer_model = str(data / ("tokenizer.model" if is_file else "tokenizer"))
        if previous is None and tree.get("start"):
            start = data / str(tree["start"]).replace("{seed}", str(seed))
            run.checkpoint.pretrained_checkpoint = str(start)
        key = (to_yaml(run), previous.folder if previous else None)
        if key not in shared:
            words = f"{arm}/seed-{seed}/{name}"
            folder = out / "runs" / words
            if previous is not None:
                run.checkpoint.pretrained_checkpoint = str(previous.checkpoints)
            run.logging.log_dir, run.logging.tensorboard = str(folder), False
            run.checkpoint.save, run.checkpoint.keep_last = str(folder / "checkpoints"), 1
            shared[key] = StageRun(name=words, folder=folder, run=run)
        previous = shared[key]
        yield previous


def _resolve(
    tree: dict[str, Any], name: str, entries: list[dict], faults: list[str], *, source: str
) -> RunConfig:
    """Build one stage: its recipe, changed by settings of the file, the stage and the arm."""
    merged = {key: value for entry in entries for key, value in entry.items()}
    run = copy.deepcopy(get_recipe(f"{tree['recipe']}/{merged.get('as', name)}"))
    for settings in (tree.get("settings"), *(entry.get("settings") for entry in entries)):
        apply_changes(run, changes_from_tree(RunConfig, settings or {}, faults, source=source))
    samples, batch = merged.get("samples"), run.training.global_batch_size
    if not isinstance(samples, int) or samples < batch or samples % batch:
        raise ConfigError(f"samples={samples}: must be a multiple of global_batch_size={batch}")
    run.training.train_iters = run.training.eval_interval = samples // batch
    run.checkpoint.save_interval = max(samples // batch, run.checkpoint.save_interval)
    return run
