"""Cards: one page for each recipe, written from the results of `croc prove` alone.

A card of an earlier run is replaced as a whole, so that its figures belong together. Each has its
machine and commit. What was not run stands in it as `not measured`.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_croc.atomic_files import write_atomically
from megatron_croc.verification.prove.result import Result
from megatron_croc.verification.prove.stage import Stage

NOT_MEASURED = "not measured"


def write_cards(
    folder: Path, recipes: Sequence[str], stages: Sequence[Stage], results: Sequence[Result]
) -> list[Path]:
    """Write RECIPE.md for each recipe; dry runs are refused by the caller.

    Args:
        folder: of the cards.
        recipes: their names.
        stages: the list.
        results: of one run of the list, on one machine.
    """
    by_name = {result.stage: result for result in results}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for recipe in recipes:
        shown = [stage for stage in stages if recipe in stage.recipes]
        text = card(recipe, shown, by_name)
        written.append(folder / f"{recipe}.md")
        write_atomically(written[-1], text.encode())
    return written


def card(recipe: str, stages: Sequence[Stage], results: dict[str, Result]) -> str:
    """Text of one card."""
    lines = [
        f"# {recipe}",
        "",
        "Written by `croc prove`; not edited by hand.",
        "",
        "| shown | result | where | when | commit |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(stage, results.get(stage.name)) for stage in stages]
    for stage in stages:
        result = results.get(stage.name)
        if result is None or not (result.commands and _has_run(result)):
            continue
        lines += ["", f"## {stage.name}", "", f"{stage.shows[:1].upper()}{stage.shows[1:]}.", ""]
        lines += [f"    {command}" for command in result.commands]
        if result.figures:
            lines += ["", "| figure | value |", "|---|---|"]
            lines += [f"| {name} | {_value(value)} |" for name, value in result.figures.items()]
    machines = {str(r.machine): r.machine for r in results.values() if _has_run(r)}
    if machines:
        lines += ["", "## Versions", ""]
    for machine in machines.values():
        versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        driver = f", driver {machine.driver}" if machine.driver else ""
        lines.append(f"{machine.title}{driver}; Python {machine.python}; {versions}.")
    return "\n".join(lines) + "\n"


def _has_run(result: Result) -> bool:
    return result.status in ("passed", "failed", "timed out")


def _row(stage: Stage, result: Result | None) -> str:
    if result is None or not _has_run(result):
        reason = f" ({result.reason})" if result is not None and result.reason else ""
        return f"| {stage.shows} | {NOT_MEASURED}{reason} | | | |"
    told = result.status if result.status == "passed" else f"**{result.status}**: {result.reason}"
    return (
        f"| {stage.shows} | {told.replace('|', '/')} | {result.machine.title} | {result.date} "
        f"| {result.commit} |"
    )


def _value(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")
