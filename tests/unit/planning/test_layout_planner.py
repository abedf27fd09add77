import json

import pytest

from megatron_croc.cli import plan
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.planning.published import CASES
from megatron_croc.planning.search import assess, search
from megatron_croc.planning.step_time import estimate_step
from megatron_croc.planning.workload import Workload, from_numbers
from megatron_croc.recipes import get_recipe

H100 = get_gpu("h100")


def small_run():
    run = get_recipe("croc_7b/pretrain_croc")
    run.training.global_batch_size = 16
    return run


def test_layouts_are_possible_and_sorted():
    run = small_run()
    found = search(run, 8, H100, from_numbers(run, text_tokens=200))
    for candidate in found:  # 32 layers, 32 heads, 16 samples a step, 8 GPUs
        parallel, micro = candidate.run.parallel, candidate.run.training.micro_batch_size
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        cp, vpp = parallel.context_parallel_size, parallel.virtual_pipeline_model_parallel_size
        dp, left = divmod(8, tp * pp * cp)
        assert left == 0 and 32 % tp == 0 and 32 % (pp * (vpp or 1)) == 0
        assert 16 % (micro * dp) == 0
        assert tp > 1 or not parallel.sequence_parallel
    fitting = [c for c in found if c.free >= 0]
    assert found[: len(fitting)] == fitting
    fastest = min(c.time.total for c in fitting)
    assert found[0].time.total <= 1.05 * fastest
    assert found[0].free >= 0


def test_parts_add_up_and_recomputation_costs_a_forward_pass():
    run = small_run()
    load = from_numbers(run, text_tokens=200)
    plain = estimate_step(run, 8, H100, load)
    assert plain.total == pytest.approx(sum(plain.parts.values()))
    run.training.recompute_granularity = "full"
    again = estimate_step(run, 8, H100, load)
    assert again.recompute == pytest.approx(again.compute / 3, rel=0.1)


def test_bubble_is_the_formula_without_vision_or_loss():
    run = small_run()
    run.stage, run.model.language_model.vocab_size = "finetune", 1
    run.model.attention_mask_type = "causal"
    run.parallel.tensor_model_parallel_size, run.parallel.sequence_parallel = 1, False
    run.parallel.pipeline_model_parallel_size, run.training.micro_batch_size = 4, 1
    load = Workload(lengths=(2048.0,), images=0.0, peak_tokens=2048)
    step = estimate_step(run, 8, H100, load)  # DP 2, 8 micro-batches
    busy = step.compute + step.pipeline_traffic
    assert step.bubble / busy == pytest.approx(3 / 8, rel=0.02)


def test_vision_on_the_first_stage_makes_the_others_wait():
    run = small_run()
    run.parallel.tensor_model_parallel_size, run.parallel.sequence_parallel = 1, False
    run.parallel.pipeline_model_parallel_size = 4
    load = from_numbers(run, text_tokens=100, images=4)
    even = estimate_step(run, 8, H100, load)
    run.parallel.decoder_first_pipeline_num_layers = 5
    assert estimate_step(run, 8, H100, load).total < even.total


def test_what_does_not_fit_is_told():
    run = get_recipe("croc_7b/finetune")
    candidate = assess(run, 2, get_gpu("a100-40"), from_numbers(run, text_tokens=2000))
    assert candidate.free < 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.gpus} {case.gpu}")
def test_published_throughputs_are_met_as_documented(case):
    assert case.predict() == pytest.approx(case.tokens, rel=0.4 if "Llama" in case.name else 0.2)


def test_command(capsys):
    words = ["--recipe", "croc_7b/pretrain_croc", "--gpus", "8", "--global-batch-size", "16"]
    assert plan.main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 5 and rows[0]["reason"] == "the fastest that fits"
    assert "--tensor-model-parallel-size" in rows[0]["flags"]
    assert plan.main([*words, "--gpu", "h1000"]) == 1
    assert "choose from h100" in capsys.readouterr().err
    assert plan.main([*words, "--gpus", "7"]) == 1
    assert "error: --gpus 7" in capsys.readouterr().err
