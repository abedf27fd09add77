"""Do a skipped step again: croc replay SAVE/anomalies/iter_0000012.json

Settings after the report change the run it describes (--data-path, --load of a checkpoint at or
before the step). One process does the whole step whatever the layout of the run; for a model too
large for one, start it under torchrun with as many processes as the run had.
Exit status: 0 the step is wrong again, 2 it is right this time, 1 it could not be done.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_croc.config.base import apply_changes, changes_from_words, raise_faults
from megatron_croc.config.parser import CommandParser
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import CrocError
from megatron_croc.log import rank

if TYPE_CHECKING:
    from megatron_croc.training.replay import Findings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = CommandParser(
        prog="croc replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("report", help="SAVE/anomalies/iter_....json")
    options, words = parser.parse_known_args(argv)
    from megatron_croc.parallel.groups import stop_distributed
    from megatron_croc.training.replay import read_report, replay, run_of_report

    try:
        report = read_report(options.report)
        run = run_of_report(report, source=options.report)
        faults: list[str] = []
        apply_changes(run, changes_from_words(RunConfig, words, faults))
        raise_faults(faults)
        findings = replay(run, report)
    except CrocError as error:
        print(f"error on rank {rank()}: {error}", file=sys.stderr)
        return 1
    print("\n".join(describe(findings, report)))
    stop_distributed()
    return 0 if is_wrong_again(findings, report) else 2


def is_wrong_again(findings: "Findings", report: dict[str, Any]) -> bool:
    """Return True if the replayed step shows the fault of the report."""
    values = (findings.metrics.loss, findings.metrics.grad_norm or 0.0)
    if not all(map(math.isfinite, values)):
        return True
    was = report["loss"]
    is_spike = report["reason"].startswith("loss ") and "times" in report["reason"]
    return is_spike and math.isclose(findings.metrics.loss, float(was), rel_tol=1e-2)


def _cause(findings: "Findings", report: dict[str, Any]) -> str:
    """Line that tells samples, weights and device apart."""
    ranks = ", ".join(str(entry["rank"]) for entry in report["ranks"])
    spoiled = [entry for entry in report["ranks"] if entry.get("bad_weights")]
    if is_wrong_again(findings, report):
        if findings.bad_weights:
            names = ", ".join(findings.bad_weights)
            return (
                f"it is wrong again, and the cause are the weights: {names} not finite before the "
                "step; resume from an earlier checkpoint"
            )
        return "it is wrong again with finite weights: look at the samples marked below"
    if spoiled:
        where = "; ".join(f"rank {e['rank']}: {', '.join(e['bad_weights'])}" for e in spoiled)
        return (
            "it is right this time, but in the run the weights in memory were not finite "
            f"({where}): look at the device; the checkpoint is good, the same command goes on"
        )
    return (
        "it is right this time: neither samples nor weights explain it; look at the device of "
        f"rank {ranks}"
    )


def describe(findings: "Findings", report: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed."""
    iteration, metrics = report["iteration"], findings.metrics
    yield f"step {iteration}, skipped because: {report['reason']}"
    between = iteration - 1 - findings.start
    yield f"weights: iteration {findings.start}, and {between} steps from there"
    yield f"loss {metrics.loss:.6g} (was {report['loss']})"
    yield f"gradient norm {metrics.grad_norm:.6g} (was {report['grad_norm']})"
    yield _cause(findings, report)
    for micro_batch in findings.micro_batches:
        mark = "" if micro_batch.is_finite else "   <-- not finite"
        yield f"micro-batch {micro_batch.number}{mark}"
        losses = micro_batch.text_losses or [None] * len(micro_batch.sample_ids)
        for sample, loss in zip(micro_batch.sample_ids, losses, strict=True):
            shown = f"  text loss {loss[1]:.4f} over {loss[0]} tokens" if loss else ""
            yield f"  {sample}{shown}"
        if micro_batch.reconstruction_loss is not None:
            yield f"  reconstruction loss {micro_batch.reconstruction_loss:.5f}"
        if micro_batch.bad_value:
            yield f"  first value that is not finite: {micro_batch.bad_value}"
        if micro_batch.bad_gradient:
            yield f"  first gradient that is not finite: {micro_batch.bad_gradient}"
