"""The batches, parameters, memory and operations of a run, and if it fits; in a second, no GPU.

    croc check --recipe croc_7b/pretrain_croc --world-size 8
    croc check --config run.yaml --world-size 16 --gpu h200 --shards data/captions
    croc check --recipe tiny/finetune --settings     # every setting and its value, too

The last two lines tell if the run fits the GPU: for the longest samples expected, and for samples
of full seq_length. Exits 1 after a fault of the settings (all are told at once), or when the
expected samples do not fit. Neither torch nor megatron is imported.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from megatron_croc.cli.errors import reports_errors
from megatron_croc.cli.sample_options import add_sample_options, read_workload, sample_flags
from megatron_croc.config.base import raise_faults, shown, to_tree, to_yaml
from megatron_croc.config.checks import find_faults, find_warnings
from megatron_croc.config.parts import PARTS, Part, trained_parts
from megatron_croc.config.run import RunConfig
from megatron_croc.costs.flops import Work, count_flops
from megatron_croc.errors import DataError
from megatron_croc.model.parameters import count_parameters, stage_parameters
from megatron_croc.planning.fit import GIB, Fit, expected_fit, gpu_memory, way_out, worst_fit
from megatron_croc.planning.gpus import GPUS, get_gpu
from megatron_croc.planning.workload import Workload
from megatron_croc.recipes.command_line import parse_command, run_parser

_WIDTH = 34

ATTENTION_BACKENDS = {
    "flip": "two causal flash calls: CUDA, float16 or bfloat16, head dim a multiple of 8 up to 256",
    "flex": "FlexAttention: CUDA (on a CPU without gradients)",
    "dense": "SDPA with a dense mask: everywhere, memory quadratic in a sample's length",
    "fa4": "FlashAttention 4 with a mask_mod: Hopper, float16 or bfloat16, package flash-attn-4",
    "ffa": "MagiAttention's kernels: Hopper, float16 or bfloat16, package magi-attention",
}
"""Values of `attention_backend` besides auto, in the order in which auto tries them on CUDA."""

_FLASH_MODULES = {"flash-attn 3": "flash_attn_interface", "flash-attn 2": "flash_attn"}


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, or every fault; return the exit status."""
    parser = run_parser(prog="croc check", description=__doc__ or "")
    parser.add_argument("--world-size", type=int, default=8, help="processes (default 8)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default h100)")
    add_sample_options(parser)
    parser.add_argument("--settings", action="store_true", help="also print every setting")
    parser.add_argument("--dump", action="store_true", help="print the run as YAML, nothing else")
    parser.add_argument(
        "--for-training",
        action="store_true",
        help="also require data and tokenizer, and folders that this run may write to",
    )
    options, run = parse_command(parser, argv)
    raise_faults(find_faults(run, options.world_size, for_training=options.for_training))
    if options.for_training:
        from megatron_croc.checkpoint.run_folder import refuse_other_run

        refuse_other_run(run)
    device = gpu_memory(get_gpu(options.gpu))
    workload = read_workload(options, run)
    if options.dump:
        print(to_yaml(run), end="")
        return 0
    fit = expected_fit(run, options.world_size, device, workload)
    lines = report(run, options.world_size, fit)
    if options.settings:
        lines = itertools.chain(_settings(to_tree(run)), lines)
    print("\n".join(lines).lstrip("\n"), flush=True)
    for line in find_warnings(run, for_training=options.for_training):
        print(f"warning: {line}", file=sys.stderr)
    print("\n" + "\n".join(verdict(options, run, fit, workload)))
    return 0 if fit.fits else 1


def report(run: RunConfig, world_size: int, fit: Fit) -> Iterator[str]:
    """The lines of the report, without settings and verdict."""
    yield from _section("batch", _batch_lines(run, world_size))
    yield from _section("parameters", _parameter_lines(run))
    yield from _table("parameters of one rank", _rank_table(run))
    yield from _section("operations of one step (TFLOP, at most)", _flops_lines(run))
    yield from _section("attention backends", _attention_lines(run))
    title = "memory of one rank (estimate, GiB, longest samples expected)"
    yield from _table(title, _memory_table(fit))


def verdict(
    options: argparse.Namespace, run: RunConfig, fit: Fit, workload: Workload
) -> Iterator[str]:
    """Two lines: if the expected samples fit and the way out, and if samples of seq_length do."""
    if run.data.packing:
        count = f"packs of {run.data.row_length:,} tokens"
        expected, worst_lengths = f"full {count}, samples", f"{count} full of images"
    else:
        expected = "samples"
        worst_lengths = f"every sample of {run.data.seq_length:,} tokens (seq_length)"
    lengths = (
        f"for {expected} of {workload.mean:,.0f} tokens, the longest {workload.peak_tokens:,.0f} "
        f"({sample_flags(options)})"
    )
    yield f"{fit} {lengths}{'' if fit.fits else '; ' + _remedy(options, run, fit, workload)}"
    worst = worst_fit(run, options.world_size, fit.device, workload)
    yield f"worst case: {worst} with {worst_lengths}"


def _remedy(options: argparse.Namespace, run: RunConfig, fit: Fit, workload: Workload) -> str:
    flags = way_out(run, options.world_size, fit.device, workload)
    if flags is not None:
        return f"it fits with {flags}"
    return f"no layout of {options.world_size} processes fits: take more, or another --gpu"


def _section(title: str, lines: Iterator[tuple[str, str]]) -> Iterator[str]:
    yield f"\n{title}"
    for name, value in lines:
        yield f"  {name:<{_WIDTH}}  {value}"


def _settings(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every setting with its value, section by section."""
    plain = [(k, shown(v)) for k, v in tree.items() if not isinstance(v, dict)]
    if plain:
        yield from _section(prefix or "run", iter(plain))
    for name, section in tree.items():
        if isinstance(section, dict):
            yield from _settings(section, prefix=f"{prefix}.{name}" if prefix else name)


def _batch_lines(run: RunConfig, world_size: int) -> Iterator[tuple[str, str]]:
    parallel, training = run.parallel, run.training
    unit = "packs" if run.data.packing else "samples"
    dp, count = parallel.data_parallel_size(world_size), run.num_microbatches(world_size)
    yield (
        "processes",
        f"{world_size} = TP {parallel.tensor_model_parallel_size} x PP "
        f"{parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} x DP {dp}",
    )
    yield (
        f"{unit} of one step",
        f"{training.global_batch_size} = micro-batch {training.micro_batch_size} x DP {dp} "
        f"x {count} micro-batches",
    )
    yield "tokens of one step", f"at most {training.global_batch_size * run.data.row_length:,}"
    visual = run.model.vision_tower.num_visual_tokens
    replaced = f", {run.model.num_replaced_tokens} of them replaced" if run.reconstructs else ""
    yield "visual tokens of one image", f"{visual}{replaced}"
    samples = count_samples(run.data.data_path)
    if samples is not None:
        yield "samples in data_path", f"{samples:,}"
    if training.train_iters is not None:
        yield "steps", f"{training.train_iters:,} (train_iters)"
        yield f"{unit} of the run", f"{training.train_iters * training.global_batch_size:,}"
    elif samples is not None and run.data.packing:
        yield "samples of the run", f"{int(samples * training.train_epochs):,}"
        yield "steps", "counted when training starts, by planning the packs"
    elif samples is not None:
        train_samples = int(samples * training.train_epochs)
        steps = train_samples // training.global_batch_size
        yield "samples of the run", f"{train_samples:,} ({training.train_epochs:g} epochs)"
        yield "steps", f"{steps:,}, {int(steps * run.optimizer.lr_warmup_fraction):,} of warm-up"
    else:
        yield "steps", f"{training.train_epochs:g} epochs of data that is not there yet"


def count_samples(data_path: Sequence[str]) -> int | None:
    """Samples of one epoch, from the manifests alone; None when one does not tell."""
    if not data_path:
        return None
    from megatron_croc.data.order.blend import (
        read_blend,  # numpy: only where there is data to count
    )

    try:
        return read_blend(data_path).epoch_length
    except DataError:
        return None


def _parameter_lines(run: RunConfig) -> Iterator[tuple[str, str]]:
    counts = count_parameters(run.model)
    trained = trained_parts(run.training, reconstructs=run.reconstructs)
    stages = stage_parameters(run.model, run.parallel, reconstructs=run.reconstructs)
    parts: list[Part] = [part for part in PARTS if any(part in stage for stage in stages)]
    for part in parts:
        state = "trained" if part in trained else "frozen"
        yield part, f"{counts[part]:>15,}  {state}"
    total = sum(counts[part] for part in parts)
    trained_total = sum(counts[part] for part in parts if part in trained)
    yield "total", f"{total:>15,}"
    yield "trained", f"{trained_total:>15,}  {trained_total / total:.2%}"


def _rank_table(run: RunConfig) -> Iterator[list[str]]:
    layers = run.parallel.pipeline_layers(run.model.language_model.num_layers)
    tp = run.parallel.tensor_model_parallel_size
    stages = stage_parameters(run.model, run.parallel, reconstructs=run.reconstructs)
    parts = [part for part in PARTS if any(part in stage for stage in stages)]
    yield ["pipeline stage", "layers", "total", *parts]
    for stage, held in enumerate(stages):
        counts = [held[part].on_rank(tp) if part in held else 0 for part in parts]
        yield [str(stage), str(layers[stage]), *(f"{n:,}" for n in (sum(counts), *counts))]


def _memory_table(fit: Fit) -> Iterator[list[str]]:
    yield ["pipeline stage", "highest", "start", "saving", "step", *fit.stages[0].parts]
    for stage, memory in enumerate(fit.stages):
        sizes = (memory.peak, memory.construction, memory.saving, memory.total)
        sizes = (*sizes, *memory.parts.values())
        yield [str(stage), *(f"{size / GIB:.1f}" for size in sizes)]


def _table(title: str, rows: Iterator[list[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell, aligned to the right."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield f"\n{title}"
    for row in cells:
        yield "  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))


def _flops_lines(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Every sample as long as seq_length, with one image and a label at every text token."""
    samples = run.training.global_batch_size
    has_spans = run.model.attention_mask_type != "causal"
    spans = [run.model.vision_tower.num_visual_tokens] if has_spans else []
    length = run.data.seq_length
    text_tokens = max(length - run.model.vision_tower.num_visual_tokens, 0)
    work = Work.from_lengths([length], num_labels=text_tokens, num_images=1, span_lengths=spans)
    flops = count_flops(run, work)
    for name, count in flops.items():
        yield name, f"{count * samples / 1e12:>12,.3f}"
    total = sum(flops.values())
    yield "total", f"{total * samples / 1e12:>12,.3f}"
    yield "one sample", f"{total / 1e12:>12,.3f}"


def _attention_lines(run: RunConfig) -> Iterator[tuple[str, str]]:
    """The backends and what they need; the flash packages are looked for, not imported."""
    chosen = run.model.attention_backend
    auto = "the fastest measured on this GPU; unmeasured: flip, flex, dense; on a CPU dense"
    for name, needs in {"auto": auto, **ATTENTION_BACKENDS}.items():
        yield f"{name} (chosen)" if name == chosen else name, needs
    for package, module in _FLASH_MODULES.items():
        yield f"flip on {package}", "installed" if find_spec(module) else "not installed"
    yield "flip on torch's own flash", "part of torch"
