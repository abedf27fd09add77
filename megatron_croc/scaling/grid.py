"""A grid of runs as one YAML file; every run is resolved and checked before any is started.

recipe: tiny/pretrain_croc
world_size: 1                        # processes of each run
gpu: h100                            # for the price; see croc plan
settings: {optimizer: {lr: 2e-3}}    # of all runs, as in a --config file
samples: [100000, 300000]            # several of them; a law needs three or more
sizes:                               # optional; settings of each model size
  small: {model: {language_model: {hidden_size: 64}}}
axes: {pool_size: [1024, 2048]}      # optional; any settings, by their leaf names
seeds: [1, 2]                        # optional
start: start/{size}-{seed}           # optional; initial weights, below --data
"""

import copy
import itertools
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
)
from megatron_croc.config.checks import find_faults
from megatron_croc.config.parts import trained_parts
from megatron_croc.config.run import RunConfig
from megatron_croc.config.settings import set_setting, settings_of
from megatron_croc.errors import ConfigError
from megatron_croc.model.parameters import count_parameters
from megatron_croc.recipes import get_recipe

_KEYS = ("recipe", "world_size", "gpu", "settings", "sizes", "samples", "axes", "seeds", "start")


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """One run of the grid."""

    name: str
    """Folder of the run, unique in the grid."""

    size: str
    """Name of its model size."""

    num_parameters: int
    """Trained parameters: what N means in the fit."""

    num_samples: int
    """Samples it sees: D. A multiple of the global batch."""

    axes: dict[str, Any]
    """Values of the other axes; runs that share them are fitted together."""

    run: RunConfig
    """The resolved run."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All runs, and what they run on."""

    runs: list[GridRun]
    world_size: int
    gpu: str


def read_grid(path: Path, out: Path, *, data: Path | None = None) -> Grid:
    """Resolve every run of the grid.

    Args:
        path: the YAML file.
        out: logs of the runs go under `out`/runs.
        data: folder with shards/STAGE, shards/valid_STAGE and tokenizer.model, for all runs.

    Raises:
        ConfigError: with every fault of the file and of every run, a line each.
    """
    tree = read_yaml(path)
    faults = [f"{path}: unknown key {k}{nearest(k, _KEYS)}" for k in tree if k not in _KEYS]
    faults += [f"{path}: {k} is missing" for k in ("recipe", "samples") if not tree.get(k)]
    for key, kind in {"sizes": dict, "axes": dict, "samples": list, "seeds": list}.items():
        if key in tree and not isinstance(tree[key], kind):
            name = "a mapping" if kind is dict else "a list"
            faults.append(f"{path}: {key} must be {name}, got {tree[key]!r}")
    if tree.get("start") and data is None:
        faults.append(f"{path}: start is a folder below --data, which is not given")
    raise_faults(faults)
    world_size = int(tree.get("world_size", 1))
    runs = list(_resolve(tree, out, faults, source=str(path), data=data))
    for entry in runs:
        faults += [f"{entry.name}: {fault}" for fault in find_faults(entry.run, world_size)]
    raise_faults(list(dict.fromkeys(faults)))
    return Grid(runs=runs, world_size=world_size, gpu=str(tree.get("gpu", "h100")))


def _resolve(
    tree: dict[str, Any], out: Path, faults: list[str], *, source: str, data: Path | None
) -> Iterator[GridRun]:
    base = get_recipe(tree["recipe"])
    apply_changes(
        base, changes_from_tree(RunConfig, tree.get("settings") or {}, faults, source=source)
    )
    if data is not None:
        base.data.data_path = (str(data / "shards" / base.stage),)
        base.data.valid_data_path = (str(data / "shards" / f"valid_{base.stage}"),)
        base.data.tokenizer_model = str(data / "tokenizer.model")
    settings = {setting.name: setting for setting in settings_of(RunConfig)}
    axes: dict[str, list[Any]] = tree.get("axes") or {}
    for name in [name for name in axes if name not in settings]:
        faults.append(f"{source}: axes: unknown setting {name}{nearest(name, settings)}")
    if faults:
        return
    sizes: dict[str, Any] = tree.get("sizes") or {tree["recipe"].partition("/")[0]: {}}
    counts: list[int] = tree["samples"]
    seeds: list[int] = tree.get("seeds") or [base.training.seed]
    combinations = itertools.product(*([(k, v) for v in vs] for k, vs in axes.items()))
    for values in combinations:
        for (size, changes), samples, seed in itertools.product(sizes.items(), counts, seeds):
            run = copy.deepcopy(base)
            apply_changes(run, changes_from_tree(RunConfig, changes, faults, source=source))
            for name, value in values:
                try:
                    set_setting(run, settings[name].path, settings[name].from_value(value))
                except ValueError as error:
                    faults.append(f"{source}: axes.{name} {error}")
            words = [size, f"{samples}", *(f"{k}-{v}" for k, v in values)]
            name = "_".join(words + ([f"seed-{seed}"] if len(seeds) > 1 else []))
            run.training.seed = seed
            if tree.get("start") and data is not None:
                start = str(tree["start"]).replace("{size}", size).replace("{seed}", str(seed))
                run.checkpoint.pretrained_checkpoint = str(data / start)
            yield _finish(run, name, size, samples, dict(values), out)


def _finish(
    run: RunConfig, name: str, size: str, samples: int, axes: dict[str, Any], out: Path
) -> GridRun:
    """Turn a number of samples into steps, and validate once, at the end."""
    batch = run.training.global_batch_size
    if samples < batch:
        raise ConfigError(f"{name}: samples={samples} is less than global_batch_size={batch}")
    iterations = samples // batch
    run.training.train_iters = run.training.eval_interval = iterations
    run.logging.log_dir = str(out / "runs" / name)
    run.logging.tensorboard = False
    run.logging.log_interval = max(1, min(run.logging.log_interval, iterations))
    if run.checkpoint.save is not None:  # the grid's folder of checkpoints, one below it per run
        run.checkpoint.save = str(Path(run.checkpoint.save) / name)
    counts = count_parameters(run.model)
    trained = trained_parts(run.training, reconstructs=run.reconstructs)
    return GridRun(
        name=name,
        size=size,
        num_parameters=sum(counts[part] for part in trained),
        num_samples=iterations * batch,
        axes=axes,
        run=run,
    )
