"""Compare the training step with a recorded run of the released Croc or ViCToR code.

CASE.json      configuration ----> RunConfig
state*.safetensors --name map----> CrocModel (any TP, PP)
CASE.safetensors  ids, labels ---> collate ---> Batch, with the recorded patch draw and pixels
                  outputs <------- compare ---- hooks, losses, gradients of one real step
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_croc.config.checks import check_run
from megatron_croc.config.run import RunConfig
from megatron_croc.convert.names import Rule, build_rules
from megatron_croc.convert.state import gather_state, load_state
from megatron_croc.errors import CrocError
from megatron_croc.log import rank
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.model.language_model import LanguageModel, LanguageModelOutput
from megatron_croc.parallel.groups import start_distributed, stop_distributed
from megatron_croc.training.build import build_model, wrap_model
from megatron_croc.training.step import TrainStep
from megatron_croc.verification.golden.case import Case, build_batch, build_run, load_case
from megatron_croc.verification.golden.compare import Finding, compare_forward, compare_gradients


class Recorder:
    """Outputs of the model's parts during one step, kept by the rank that computes them."""

    def __init__(self, models: Sequence[CrocModel], tp: dist.ProcessGroup) -> None:
        """Register hooks on the parts of this rank."""
        self.seen: dict[str, Tensor] = {}
        self.tp = tp
        for model in models:
            parts = {
                "image_features_l2": (model.projector, lambda out: out),
                "vision_features": (model.vision_tower, lambda out: out),
                "pool_index": (model.prompt_pool, lambda out: out.index.flatten()),
                "reconstruction": (model.reconstruction_head, lambda out: out),
            }
            if model.post_process:
                # A step computes the logits of labelled positions only; here all are compared.
                language_model = model.language_model
                parts["logits"] = (language_model, partial(_all_logits, language_model))
            for name, (module, take) in parts.items():
                if module is not None:
                    module.register_forward_hook(self._hook(name, take))

    def _hook(self, name: str, take: Any) -> Any:
        def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
            self.seen[name] = take(output).detach().clone()

        return keep

    def collect(self) -> dict[str, Tensor]:
        """Gather the outputs of all ranks on every rank's CPU; logits are joined over TP ranks."""
        if "logits" in self.seen and self.tp.size() > 1:
            parts = [torch.empty_like(self.seen["logits"]) for _ in range(self.tp.size())]
            dist.all_gather(parts, self.seen["logits"].contiguous(), group=self.tp)
            self.seen["logits"] = torch.cat(parts, dim=-1)
        everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, {name: seen.cpu() for name, seen in self.seen.items()})
        return {name: tensor for seen in everyone for name, tensor in seen.items()}


@torch.no_grad()
def _all_logits(language_model: LanguageModel, output: LanguageModelOutput) -> Tensor:
    """Logits [T, C / TP] of every position of a forward pass."""
    return language_model.logits(output.hidden_states).squeeze(1)


def run_golden(path: Path, *, tp: int, pp: int, sequence_parallel: bool, bound: float) -> int:
    """Compare one case; 0 when every error that counts is within the bound."""
    try:
        return _run_golden(path, tp, pp, sequence_parallel, bound)
    except CrocError as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        stop_distributed()


def _run_golden(path: Path, tp: int, pp: int, sequence_parallel: bool, bound: float) -> int:
    case = load_case(path)
    run = build_run(case, tp=tp, pp=pp, sequence_parallel=sequence_parallel)
    check_run(run, tp * pp)
    pg = start_distributed(run.parallel, seed=run.training.seed)
    models = build_model(run, pg)
    rules = build_rules(run.model, case.layout)
    used = set().union(*(load_state(model, case.state, rules) for model in models))
    unused = _unused(case, run, used)
    chunks = wrap_model(run, models, pg)
    recorder = Recorder(models, pg.tp)
    batch = build_batch(case, run)
    totals = TrainStep(run, chunks, pg).forward_backward([batch])
    losses = totals.reduce(grad_norm=None)
    seen = recorder.collect()
    gradients = gather_gradients(models, rules)
    if rank() != 0:
        return 0
    print(f"{case.name}: tp {tp}, pp {pp}, sequence parallel {sequence_parallel}")
    if unused:
        print(f"  not part of the computation: {', '.join(unused)}")
    if not case.is_recorded:
        return _report_crash(case, losses.loss, gradients)
    as_dict = {
        "text": losses.text_loss,
        "reconstruction": losses.reconstruction_loss or 0.0,
        "loss": losses.loss,
    }
    findings = [
        *compare_forward(case, batch, seen, as_dict),
        *compare_gradients(case, gradients),
    ]
    return report(findings, bound)


def gather_gradients(models: Sequence[CrocModel], rules: dict[str, Rule]) -> dict[str, Tensor]:
    """Gradients of all trained parameters in the reference's names."""
    return gather_state(models, rules, lambda parameter: getattr(parameter, "main_grad", None))


def _unused(case: Case, run: RunConfig, used: set[str]) -> list[str]:
    """Prefixes of recorded tensors that no rank needed."""
    everyone: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, used)
    left = set(case.state).difference(*everyone)
    return sorted({".".join(name.split(".")[:2]) for name in left})


def _report_crash(case: Case, loss: float, gradients: dict[str, Tensor]) -> int:
    """Check that ours trains where the reference raised an error."""
    finite = math.isfinite(loss) and all(g.isfinite().all() for g in gradients.values())
    moved = sum(bool(g.abs().max() > 0) for g in gradients.values())
    print(f"  the reference raised: {case.info['exception']}")
    print(f"  here: loss {loss:.4f}, {moved} of {len(gradients)} gradients not zero")
    print("PASSED: it trains here" if finite and moved else "FAILED: it does not train here")
    return 0 if finite and moved else 1


def report(findings: list[Finding], bound: float) -> int:
    """Print the comparison, worst gradients last."""
    forward = [f for f in findings if not f.what.startswith("grad ")]
    gradients = sorted((f for f in findings if f.what.startswith("grad ")), key=lambda f: -f.error)
    for finding in forward:
        _print(finding, bound)
    if gradients:
        print(f"  {len(gradients)} gradients, the worst:")
        for finding in gradients[:5]:
            _print(finding, bound)
    counted = [f for f in findings if f.counts]
    worst = max(counted, key=lambda f: f.error)
    failed = worst.error > bound
    explained = {f.note for f in findings if not f.counts and f.error > bound}
    for note in explained:
        print(f"  differs as it should: {note}")
    verdict = "FAILED" if failed else "PASSED"
    print(f"{verdict}: worst relative error {worst.error:.2e} ({worst.what}), bound {bound:.0e}")
    return int(failed)


def _print(finding: Finding, bound: float) -> None:
    mark = " " if finding.error <= bound else ("!" if finding.counts else "~")
    note = "  (" + finding.note + ")" if finding.note and len(finding.note) < 40 else ""
    print(f"  {mark} {finding.error:9.2e}  {finding.what}{note}")
