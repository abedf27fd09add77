"""One process against parallel layouts: same weights, same batches, and a self-test.

croc parity layouts --recipe tiny/pretrain_croc --layouts "tp2 tp2+sp pp2+vpp2 cp2"
croc parity layouts --recipe tiny/pretrain_croc --layouts all4    # all on up to 4
croc parity layouts --recipe tiny/pretrain_croc --self-test       # faults are seen
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_croc.config.base import raise_faults
from megatron_croc.config.checks import find_faults
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.recipes.command_line import parse_command, run_parser
from megatron_croc.verification.layouts.layout import Layout, every_layout

DEFAULT_LAYOUTS = "tp2 tp2+sp pp2 pp2+vpp2 cp2 dp2"


def run_command(words: Sequence[str]) -> int:
    """Parse, check every layout before starting one, then compare; or run as one worker."""
    parser = run_parser(prog="croc parity layouts", description=__doc__ or "")
    parser.add_argument("--layouts", default=DEFAULT_LAYOUTS, help="tp2+sp pp2 ..., or allN")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("runs/parity"), help="for the results")
    parser.add_argument("--self-test", action="store_true", help="plant faults; all must be seen")
    parser.add_argument(
        "--plant",
        help="a fault of megatron_croc.verification.layouts.faults to plant in the layouts",
    )
    parser.add_argument(
        "--reference-on-cpu",
        action="store_true",
        help="compute the one process on the CPU, whatever the layouts run on",
    )
    parser.add_argument("--worker", help="set by this tool: the layout of this process")
    parser.add_argument("--worker-folder", type=Path, help="set by this tool")
    options, run = parse_command(parser, words)
    if options.worker is not None:
        return _work(run, options.worker, options.steps, options.worker_folder, options.plant)

    chosen = _parse_layouts(options.layouts)
    raise_faults(
        [
            f"layout {layout.name}: {fault}"
            for layout in [Layout(name="one"), *chosen]
            for fault in find_faults(layout.apply(run), layout.world_size)
        ]
    )
    from megatron_croc.verification.layouts.launch import compare_layouts

    dtype = "bf16" if run.training.bf16 else "fp32"
    if options.self_test:
        return _self_test(words, dtype=dtype, out=options.out)
    return compare_layouts(
        chosen,
        words,
        dtype=dtype,
        out=options.out,
        fault=options.plant,
        reference_on_cpu=options.reference_on_cpu,
    )


def _parse_layouts(words: str) -> list[Layout]:
    if words.startswith("all") and words[3:].isdigit():
        return every_layout(int(words[3:]))
    layouts = [Layout.parse(word) for word in words.split()]
    if not layouts:
        raise ConfigError('--layouts is empty; name some, as in "tp2 pp2+vpp2", or all4')
    return layouts


def _work(run: RunConfig, name: str, steps: int, folder: Path, fault: str | None) -> int:
    """Run one process of one layout."""
    from megatron_croc.verification.layouts.faults import FAULTS
    from megatron_croc.verification.layouts.observe import work

    layout = Layout(name="one") if name == "one" else Layout.parse(name)
    run = layout.apply(run)
    if fault is not None:
        FAULTS[fault][0](run)
    work(run, steps, folder)
    return 0


def _self_test(words: Sequence[str], *, dtype: str, out: Path) -> int:
    """Plant each known fault; 0 when every one is reported."""
    from megatron_croc.verification.layouts.faults import FAULTS
    from megatron_croc.verification.layouts.launch import compare_layouts

    missed = []
    for name, (_, layout) in FAULTS.items():
        print(f"planted: {name}")
        if compare_layouts([Layout.parse(layout)], words, dtype=dtype, out=out, fault=name) == 0:
            missed.append(name)
    print(f"MISSED: {', '.join(missed)}" if missed else f"all {len(FAULTS)} faults were seen")
    return int(bool(missed))
