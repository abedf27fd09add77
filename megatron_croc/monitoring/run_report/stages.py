"""Files of finished stages: metrics.jsonl and run.yaml of each. Needs neither torch nor GPU.

RUN_DIR/<stage>/metrics.jsonl            training rows and validation rows, by iteration
RUN_DIR/<stage>/iter_0000120/run.yaml    the complete configuration
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_croc.checkpoint.state import latest_checkpoint
from megatron_croc.config.base import apply_changes, changes_from_tree, raise_faults, read_yaml
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import CheckpointError, DataError
from megatron_croc.training.reporting.metrics_log import read_metric_rows

Row = dict[str, float]
"""One line of metrics.jsonl."""

Table = list[list[str]]
"""Header first."""

_VALIDATION = "valid_loss"
_ARROW = " -> "
_ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of a run, as found on disk."""

    name: str
    """Folder name, which is the stage's in the quickstart."""

    run: RunConfig
    """The configuration it was trained with."""

    checkpoint: Path
    """Its latest checkpoint."""

    train: list[Row]
    """Training rows by iteration; at least one."""

    valid: list[Row]
    """Validation rows by iteration; may be empty."""

    @property
    def layout(self) -> str:
        """`TP 2 x PP 1 x DP 1`; DP only where the rows say how many processes there were."""
        parallel = self.run.parallel
        parts = [
            f"TP {parallel.tensor_model_parallel_size}",
            f"PP {parallel.pipeline_model_parallel_size}",
        ]
        if parallel.context_parallel_size > 1:
            parts.append(f"CP {parallel.context_parallel_size}")
        if "world_size" in self.train[-1]:
            parts.append(f"DP {parallel.data_parallel_size(int(self.train[-1]['world_size']))}")
        return " x ".join(parts)

    @property
    def learning_rates(self) -> dict[str, list[tuple[float, float]]]:
        """Part -> (iteration, learning rate)."""
        names = dict.fromkeys(n for row in self.train for n in row if n.startswith("lr/"))
        return {name.removeprefix("lr/"): series(self.train, name) for name in names}


def load_stage(run_dir: Path, name: str) -> StageRun:
    """Read one stage.

    Raises:
        DataError: metrics missing, empty or damaged.
        CheckpointError: no checkpoint.
        ConfigError: its run.yaml is missing or not a configuration.
    """
    folder = run_dir / name
    if not folder.is_dir():
        raise DataError(
            f"{folder} is missing: train that stage first (make quickstart trains all three), "
            "or list the stages that are there with --stages"
        )
    train, valid = read_metrics(folder / "metrics.jsonl")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(
            f"{folder} holds no finished checkpoint: train that stage to its end with "
            f"--save {folder}"
        )
    return StageRun(
        name=name,
        run=read_run(checkpoint / "run.yaml"),
        checkpoint=checkpoint,
        train=train,
        valid=valid,
    )


def check_files(stage: StageRun) -> None:
    """See that the held-out data and the tokenizer are where run.yaml says.

    Raises:
        DataError: one of them is not, or the stage had no held-out data.
    """
    data = stage.run.data
    if not data.valid_data_path:
        raise DataError(
            f"{stage.name} was trained without held-out data: train it with --valid-data-path"
        )
    for path in (*data.valid_data_path, data.tokenizer_model):
        if path is not None and not Path(path).exists():
            raise DataError(
                f"{path}, named in {stage.checkpoint / 'run.yaml'}, is not there: call this from "
                "the folder training was started in, or put the data back"
            )


def read_run(path: Path) -> RunConfig:
    """The configuration a checkpoint was written with; ConfigError when it cannot be read."""
    run, faults = RunConfig(), []
    tree = read_yaml(path)
    apply_changes(run, changes_from_tree(RunConfig, tree, faults, source=str(path)))
    raise_faults(faults)
    return run


def read_metrics(path: Path) -> tuple[list[Row], list[Row]]:
    """Training rows and validation rows of one metrics file.

    A run that was stopped and resumed has written some steps twice: the later row counts.

    Raises:
        DataError: not there, a line that is no row, or no training row.
    """
    try:
        lines = list(read_metric_rows(path))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): training writes it into the folder given "
            "with --save; train the stage again, or leave it out with --stages"
        ) from error
    train: list[Row] = []
    valid: list[Row] = []
    for number, row in lines:
        if row is None:
            raise DataError(
                f"{path}:{number} is no row of metrics: remove that line, or train the stage again"
            )
        iteration = row["iteration"]
        if _VALIDATION in row:
            valid = [*_before(valid, iteration), row]
            continue
        if train and iteration <= train[-1]["iteration"]:
            train, valid = _before(train, iteration), _before(valid, iteration)
        train.append(row)
    if not train:
        raise DataError(
            f"{path} holds no training step yet: let the stage run for at least one log interval"
        )
    return train, valid


def _before(rows: list[Row], iteration: float) -> list[Row]:
    return [row for row in rows if row["iteration"] < iteration]


def series(rows: Iterable[Row], name: str) -> list[tuple[float, float]]:
    """(iteration, value) of the rows that have the value."""
    return [(row["iteration"], row[name]) for row in rows if name in row]


def loss_table(stages: Sequence[StageRun]) -> Table:
    """Layout, throughput, and how far each loss came."""
    head = ["stage", "layout", "steps", "text loss", "held-out text", "reconstruction"]
    head += ["held-out rec.", "tokens/s", "s/step"]
    return [head] + [
        [
            stage.name,
            stage.layout,
            f"{int(stage.train[-1]['iteration'])}",
            first_and_last(stage.train, "text_loss", "{:.3f}"),
            first_and_last(stage.valid, "valid_text_loss", "{:.3f}"),
            first_and_last(stage.train, "reconstruction_loss", "{:.4f}"),
            first_and_last(stage.valid, "valid_reconstruction_loss", "{:.4f}"),
            _median(stage.train, "tokens_per_second", "{:,.0f}"),
            _median(stage.train, "seconds_per_step", "{:.2f}"),
        ]
        for stage in stages
    ]


def optimizer_table(stages: Sequence[StageRun]) -> Table:
    """Learning rates, gradient norm, and the pool."""
    head = ["stage", "highest learning rate", "grad norm", "pool rows used in a step"]
    head += ["mean matched distance"]
    return [head] + [
        [
            stage.name,
            _highest_rates(stage),
            first_and_last(stage.train, "grad_norm", "{:.2f}"),
            first_and_last(stage.train, "pool_usage", "{:.1%}"),
            first_and_last(stage.train, "matched_distance", "{:.2f}"),
        ]
        for stage in stages
    ]


def first_and_last(rows: Sequence[Row], name: str, form: str) -> str:
    """`3.498 -> 0.463`."""
    values = [value for _, value in series(rows, name)]
    if not values:
        return _ABSENT
    ends = [values[0], values[-1]] if len(values) > 1 else values
    return _ARROW.join(form.format(value) for value in ends)


def _median(rows: Sequence[Row], name: str, form: str) -> str:
    values = [value for _, value in series(rows, name)]
    return form.format(statistics.median(values)) if values else _ABSENT


def _highest_rates(stage: StageRun) -> str:
    """`2.0e-03 projector, prompt pool`: parts with the same rate together."""
    parts: dict[float, list[str]] = {}
    for part, points in stage.learning_rates.items():
        parts.setdefault(max(rate for _, rate in points), []).append(part.replace("_", " "))
    return "; ".join(f"{rate:.1e} {', '.join(names)}" for rate, names in parts.items()) or _ABSENT


def as_text(table: Table) -> str:
    """A table for the terminal; columns that hold nothing are left out."""
    columns = [c for c in zip(*table, strict=True) if any(cell != _ABSENT for cell in c[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
