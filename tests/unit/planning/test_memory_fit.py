import copy

import pytest

from megatron_croc.config.base import apply_changes, changes_from_words
from megatron_croc.config.checks import find_faults
from megatron_croc.planning.fit import GIB, Device, expected_fit, gpu_memory, way_out, worst_fit
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.planning.layouts import (
    METHOD,
    MICRO_BATCH,
    RECOMPUTED_LAYERS,
    SP,
    TP,
    memory_savings,
)
from megatron_croc.planning.memory import estimate_memory
from megatron_croc.planning.search import assess
from megatron_croc.planning.workload import from_numbers
from megatron_croc.recipes import get_recipe

H100 = get_gpu("h100")


def run_of(**parallel: object):
    run = get_recipe("croc_7b/pretrain_croc")
    for name, value in parallel.items():
        setattr(run.parallel, name, value)
    return run


def test_figures_add_up():
    run, load = run_of(), from_numbers(run_of(), text_tokens=200)
    fit = expected_fit(run, 8, Device(name="x", memory=60e9, reserved=2e9), load)
    assert fit.tensors == max(s.total for s in estimate_memory(run, 8, load.pack(run)))
    assert fit.needed == pytest.approx(1.1 * fit.tensors + 2e9)
    assert fit.free == pytest.approx(60e9 - fit.needed)
    exact = Device(name="x", memory=fit.needed, reserved=2e9)
    assert expected_fit(run, 8, exact, load).fits
    short = Device(name="x", memory=fit.needed - 1, reserved=2e9)
    assert not expected_fit(run, 8, short, load).fits


def test_figures_are_told_in_gib():
    fit = expected_fit(run_of(), 8, gpu_memory(H100), from_numbers(run_of(), text_tokens=200))
    assert f"of {80e9 / 1024**3:.1f} GiB" in str(fit) and "of 74.5 GiB" in str(fit)


def test_the_planner_decides_by_the_same_figures():
    run, load = run_of(), from_numbers(run_of(), text_tokens=200)
    assert assess(run, 8, H100, load).fit == expected_fit(run, 8, gpu_memory(H100), load)


def test_the_fullest_stage_decides():
    run = run_of(pipeline_model_parallel_size=4)
    fit = expected_fit(run, 8, gpu_memory(H100), from_numbers(run, text_tokens=200))
    assert fit.tensors == max(stage.total for stage in fit.stages) > fit.stages[1].total


def test_the_worst_case_is_full_and_holds_no_fewer_images():
    run = get_recipe("victor_7b/finetune")  # the tower is trained: images count
    device = gpu_memory(H100)
    few, many = (from_numbers(run, text_tokens=200, images=n) for n in (1, 5))
    assert worst_fit(run, 8, device, few).stages == estimate_memory(run, 8)
    assert worst_fit(run, 8, device, many).tensors > worst_fit(run, 8, device, few).tensors


def test_a_full_pack_holds_as_many_images_as_its_samples():
    run = get_recipe("croc_7b/finetune")
    run.data.packing, run.training.micro_batch_size = True, 2
    load = from_numbers(run, text_tokens=448, images=1, spread=0)  # 1,024 tokens each
    pack = load.pack(run)
    assert (pack.tokens, pack.images) == (2 * 4096, 8)


def test_savings_come_smallest_first_and_never_cost_memory():
    run = run_of(sequence_parallel=False)
    run.training.micro_batch_size = 4
    found = memory_savings(run, 16, 8)
    assert found[:3] == [{MICRO_BATCH: 2}, {MICRO_BATCH: 1}, {SP: True}]
    load = from_numbers(run, text_tokens=2000)
    before = expected_fit(run, 16, gpu_memory(H100), load).tensors
    for changes in found:
        changed = copy.deepcopy(run)
        apply_changes(changed, changes)
        if 16 % changed.parallel.model_parallel_size or changes.get(TP, 2) > 8:
            continue
        assert expected_fit(changed, 16, gpu_memory(H100), load).tensors <= before, changes


def test_a_way_out_keeps_what_the_run_recomputes():
    run = run_of()
    training, load = run.training, from_numbers(run, text_tokens=200)
    training.recompute_granularity, training.recompute_num_layers = "full", 4
    assert not any(RECOMPUTED_LAYERS in changes for changes in memory_savings(run, 8, 8))
    training.recompute_method = "block"  # only four layers of a stage: more can be recomputed
    found = memory_savings(run, 8, 8)
    assert found[:2] == [{MICRO_BATCH: 1}, {METHOD: "uniform", RECOMPUTED_LAYERS: 1}]
    assert way_out(run, 8, Device(name="x", memory=1e9), load) is None


def test_a_way_out_passes_the_checks():
    run = get_recipe("victor_7b/finetune")  # 28 heads: TP 8 would need less, and cannot be
    load = from_numbers(run, text_tokens=200)
    for gibibytes in range(8, 60, 2):
        flags = way_out(run, 8, Device(name="x", memory=gibibytes * GIB), load)
        if flags is None:
            continue
        faults: list[str] = []
        changed = copy.deepcopy(run)
        apply_changes(changed, changes_from_words(type(run), flags.split(), faults))
        assert faults == find_faults(changed, 8) == []
