import pytest

from megatron_croc.config.run import RunConfig
from megatron_croc.planning.memory import MemoryEstimate, Pack, estimate_memory
from megatron_croc.recipes import get_recipe


def largest(run: RunConfig, world_size: int = 8) -> MemoryEstimate:
    return max(estimate_memory(run, world_size), key=lambda stage: stage.total)


def test_weights_and_optimizer_by_hand():
    run = get_recipe("croc_7b/finetune")
    run.parallel.tensor_model_parallel_size = 1
    run.parallel.sequence_parallel = False
    run.training.micro_batch_size = 1
    trained = 6_738_415_616 + 20_979_712
    memory = largest(run)
    assert memory.weights == 2 * (trained + 290_909_184)
    assert memory.gradients == 4 * trained
    assert memory.optimizer == 12 * trained / 8
    # One layer keeps 4 h (norms), 6 h (attention), 3 ffn (fused), rotary tables; 2 bytes each.
    decoder = 32 * 4096 * 2 * (10 * 4096 + 3 * 11008 + 4 * 128)
    assert decoder < memory.activations < 1.05 * decoder


@pytest.mark.parametrize(
    "saves",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 16},
        {"micro_batch_size": 1},
    ],
)
def test_what_is_done_to_save_activations_saves_them(saves: dict[str, object]):
    run = get_recipe("croc_7b/pretrain_croc")
    run.training.micro_batch_size = 2
    before = largest(run).activations
    for name, value in saves.items():
        setattr(run.training, name, value)
    assert largest(run).activations < 0.6 * before


def test_recomputing_a_trained_tower_by_hand():
    run = get_recipe("victor_7b/finetune")
    run.training.micro_batch_size = 1
    run.parallel.tensor_model_parallel_size = 1
    run.parallel.sequence_parallel = False
    before = largest(run).activations
    run.training.recompute_vision = True
    # SigLIP2-so400m: 26 of its layers run on 27 x 27 patches of width 1152, FFN 4304; 2 bytes.
    # A layer keeps 8 h (norms, QKV, attention, its output) and 2 ffn (GELU); redone: its input.
    layer = 8 * 1152 + 2 * 4304
    saved = 2 * 729 * (26 * layer - (26 * 1152 + layer))
    assert before - largest(run).activations == saved


def test_early_pipeline_stages_hold_more_micro_batches():
    run = get_recipe("croc_7b/pretrain_croc")
    run.parallel.pipeline_model_parallel_size = 4
    run.parallel.tensor_model_parallel_size = 2
    stages = estimate_memory(run, 8)
    decoder = [stage.activations for stage in stages]
    assert decoder == sorted(decoder, reverse=True)
    assert decoder[1] == pytest.approx(3 * decoder[2] / 2)
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]
    run.parallel.virtual_pipeline_model_parallel_size = 2
    assert estimate_memory(run, 8)[0].activations > stages[0].activations


def test_float32_has_no_second_copy_of_the_weights():
    run = get_recipe("croc_7b/finetune")
    half = largest(run)
    run.training.bf16 = False
    full = largest(run)
    assert full.weights == 2 * half.weights
    assert full.optimizer == pytest.approx(half.optimizer * 8 / 12)


def test_context_parallel_ranks_share_the_images_of_the_head():
    run = get_recipe("croc_7b/pretrain_croc")
    run.parallel.tensor_model_parallel_size, run.parallel.sequence_parallel = 1, False
    run.parallel.pipeline_model_parallel_size = 2  # the head is alone with the last layers
    run.parallel.context_parallel_size = 2
    run.model.reconstruction.reconstruction_dropout = 0.0
    images = {
        n: estimate_memory(run, 4, Pack(tokens=4096, images=n, labels=0))[1].activations
        for n in (1, 2, 3, 4)
    }
    # An image of 576 tokens: 20 widths of 4096 in bf16, prediction and target in float32.
    one = 20 * 576 * 4096 * 2 + 2 * 576 * 4096 * 4
    assert images[1] == images[2]  # one image on each rank at most
    assert images[3] == images[4] == images[2] + one
