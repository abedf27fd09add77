"""Tables, pictures and JSON of a comparison, from the runs that are finished.

Where some are not, a mean is over the seeds of its arm, and a difference over those of both arms.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically
from megatron_croc.errors import ConfigError
from megatron_croc.monitoring.run_report.stages import Table
from megatron_croc.scaling.arm_launch import ACCURACY, is_finished
from megatron_croc.scaling.arms import ArmRun, Comparison, Plan
from megatron_croc.scaling.launch import read_metrics
from megatron_croc.scaling.report import markdown
from megatron_croc.scaling.statistics import (
    LEVEL,
    MIN_SEEDS,
    Difference,
    Mean,
    difference_of,
    holm,
    mean_of,
)

TOTAL = "all"
"""Row of accuracy.json over all types of questions."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """Accuracies of one arm over its seeds."""

    arm: str
    accuracy: dict[str, Mean]
    """Type of question -> accuracy."""

    loss: Mean | None
    """Held-out text loss of the last stage; None where a run has none."""

    differences: dict[str, Difference]
    """Type of question -> difference to the reference; empty for the reference."""

    adjusted: dict[str, float]
    """Type -> p-value by Holm: of the total over all arms, of a type over all arms and types."""

    by_seed: dict[int, float]
    """Seed -> accuracy over all questions."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One comparison: the arms that share two finished seeds or more with the reference."""

    comparison: Comparison
    missing: tuple[str, ...]
    """Runs that are not finished."""

    questions: dict[str, int]
    """Type of question -> number of held-out questions."""

    chance: dict[str, float]
    """Type of question -> accuracy of the type's most common answer."""

    arms: list[ArmResult]


def read_accuracy(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of a finished arm's accuracy.json by type of question."""
    rows = json.loads((folder / ACCURACY).read_text(encoding="utf-8"))
    return {row["kind"]: row for row in rows}


def final_loss(arm: ArmRun) -> float | None:
    """Held-out text loss of the last stage at its last step."""
    last = arm.stages[-1]
    rows = [r for r in read_metrics(last.folder) if "valid_text_loss" in r]
    return float(rows[-1]["valid_text_loss"]) if rows else None


def collect_results(plan: Plan) -> list[Result]:
    """Compute every comparison with two arms of which the same two seeds or more are finished.

    Raises:
        ConfigError: there is none yet.
    """
    found = [result for c in plan.comparisons if (result := _collect(plan, c)) is not None]
    if not found:
        raise ConfigError(
            "no two arms of a comparison have finished the same two seeds: launch first"
        )
    return found


def _collect(plan: Plan, comparison: Comparison) -> Result | None:
    runs = {
        (arm, seed): plan.run_of(arm, seed) for arm in comparison.arms for seed in comparison.seeds
    }
    rows = {key: read_accuracy(run.folder) for key, run in runs.items() if is_finished(run)}
    reference = comparison.arms[0]
    shared = {
        arm: [s for s in comparison.seeds if (arm, s) in rows and (reference, s) in rows]
        for arm in comparison.arms
    }
    arms = [arm for arm in comparison.arms if len(shared[arm]) > 1]
    if len(arms) < 2:
        return None
    first = rows[reference, shared[reference][0]]
    kinds = [*sorted(kind for kind in first if kind != TOTAL), TOTAL]

    def values(arm: str, kind: str, seeds: Sequence[int]) -> list[float]:
        return [rows[arm, seed][kind]["accuracy"] for seed in seeds]

    differences = {
        (arm, kind): difference_of(
            values(arm, kind, shared[arm]), values(reference, kind, shared[arm])
        )
        for arm in arms[1:]
        for kind in kinds
    }
    adjusted: dict[tuple[str, str], float] = {}
    for family in (
        [key for key in differences if key[1] == TOTAL],
        [key for key in differences if key[1] != TOTAL],
    ):
        p_values = holm([differences[key].p for key in family])
        adjusted |= dict(zip(family, p_values, strict=True))
    results = []
    for arm in arms:
        seeds = [seed for seed in comparison.seeds if (arm, seed) in rows]
        losses = [final_loss(runs[arm, seed]) for seed in seeds]
        known = [loss for loss in losses if loss is not None]
        results.append(
            ArmResult(
                arm=arm,
                accuracy={kind: mean_of(values(arm, kind, seeds)) for kind in kinds},
                loss=mean_of(known) if len(known) == len(seeds) else None,
                differences={k: d for (a, k), d in differences.items() if a == arm},
                adjusted={k: p for (a, k), p in adjusted.items() if a == arm},
                by_seed=dict(zip(seeds, values(arm, TOTAL, seeds), strict=True)),
            )
        )
    return Result(
        comparison=comparison,
        missing=tuple(f"{arm}, seed {seed}" for arm, seed in runs if (arm, seed) not in rows),
        questions={kind: first[kind]["num_questions"] for kind in kinds},
        chance={kind: first[kind]["chance"] for kind in kinds},
        arms=results,
    )


def describe(result: Result) -> Iterator[str | Table]:
    """Yield the paragraphs and tables of one comparison."""
    kinds, reference = list(result.questions), result.comparison.arms[0]
    yield f"{result.comparison.question} Mean over seeds, with its standard error:"
    if result.missing:
        yield f"Not finished, and so not counted: {'; '.join(result.missing)}."
    head = [f"{kind} ({result.questions[kind]})" for kind in kinds]
    table: Table = [["arm", "seeds", *head, "held-out loss"]]
    for arm in result.arms:
        cells = [_share(arm.accuracy[kind]) for kind in kinds]
        loss = "-" if arm.loss is None else f"{arm.loss.value:.4f} ± {arm.loss.error:.4f}"
        table.append([arm.arm, ", ".join(map(str, arm.by_seed)), *cells, loss])
    table.append(["chance", "-", *(f"{result.chance[kind]:.1%}" for kind in kinds), "-"])
    yield table
    yield f"Difference to {reference}, seed by seed, in percentage points:"
    table = [["arm", "type", "seeds", "difference ± s.e.", "95 % interval", "p", "p (Holm)", ""]]
    for arm in result.arms[1:]:
        for kind in (TOTAL, *(k for k in kinds if k != TOTAL)):
            one, p = arm.differences[kind], arm.adjusted[kind]
            table.append(
                [
                    *(arm.arm, kind, str(one.num_seeds)),
                    f"{100 * one.value:+.1f} ± {100 * one.error:.1f}",
                    f"{100 * one.low:+.1f} to {100 * one.high:+.1f}",
                    *("-" if math.isnan(x) else f"{x:.3f}" for x in (one.p, p)),
                    verdict(p),
                ]
            )
    yield table


def verdict(p: float) -> str:
    """Word for an adjusted p-value; nan where there are too few seeds to test."""
    if math.isnan(p):
        return f"not tested (under {MIN_SEEDS} seeds)"
    return "significant" if p < LEVEL else "not significant"


def _share(mean: Mean) -> str:
    return f"{mean.value:.1%} ± {100 * mean.error:.1f}"


def write_arm_report(out: Path, results: Sequence[Result]) -> Path:
    """Write report.md, comparison.json and one SVG per comparison; returns the page."""
    lines = ["# Arms: accuracy on held-out questions", ""]
    for result in results:
        name = result.comparison.name
        draw(result, out / f"{name}.svg")
        lines += [f"## {name}", ""]
        for part in describe(result):
            lines += [part if isinstance(part, str) else markdown(part), ""]
        lines += [f"![{name}]({name}.svg)", ""]
    content = json.dumps([_without_nan(asdict(result)) for result in results], indent=1)
    write_atomically(out / "comparison.json", (content + "\n").encode())
    page = out / "report.md"
    write_atomically(page, "\n".join(lines).encode())
    return page


def _without_nan(value: Any) -> Any:
    """Replace nan, which JSON has not, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def draw(result: Result, path: Path) -> None:
    """Draw accuracy of each arm and seed, and the differences to the reference by type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from megatron_croc.monitoring.run_report.style import GREY, LINE_COLOURS, RC

    names, kinds = [arm.arm for arm in result.arms], list(result.questions)
    with plt.rc_context({**RC, "svg.hashsalt": "croc", "svg.fonttype": "none"}):
        height = 1.6 + 0.45 * max(len(names), len(kinds))
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, height), constrained_layout=True, width_ratios=(2, 3)
        )
        for seed in result.comparison.seeds:
            shares = [100 * arm.by_seed.get(seed, math.nan) for arm in result.arms]
            left.plot(shares, range(len(names)), color=GREY, linewidth=0.7, marker=".", alpha=0.7)
        for row, arm in enumerate(result.arms):
            mean = arm.accuracy[TOTAL]
            left.errorbar(
                100 * mean.value,
                row,
                xerr=100 * mean.error,
                fmt="o",
                capsize=4,
                color=LINE_COLOURS[row % len(LINE_COLOURS)],
            )
        left.axvline(100 * result.chance[TOTAL], color=GREY, linestyle=":", label="chance")
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.set_xlabel("all questions, % right; grey: each seed")
        left.legend(frameon=False, loc="lower left")
        others = result.arms[1:]
        for row, arm in enumerate(others):
            shift = (row - (len(others) - 1) / 2) * 0.7 / max(len(others), 1)
            for place, kind in enumerate(kinds):
                one = arm.differences[kind]
                right.errorbar(
                    100 * one.value,
                    place + shift,
                    xerr=100 * (one.high - one.value),
                    fmt="o",
                    markersize=4,
                    capsize=2,
                    color=LINE_COLOURS[(row + 1) % len(LINE_COLOURS)],
                    label=arm.arm if place == 0 else None,
                )
        right.axvline(0, color=GREY, linewidth=1)
        right.set_yticks(range(len(kinds)), kinds)
        right.invert_yaxis()
        right.set_xlabel(f"difference to {names[0]}, percentage points; 95 % intervals")
        right.legend(frameon=False, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)
