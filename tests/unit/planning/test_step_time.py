"""Seconds of a step against arithmetic done by hand, on a made-up GPU with round numbers.

The model is croc_7b: 32 layers, hidden size 4096, feed-forward 11008, 32 heads of 128, vocabulary
32,000. Every sample has 1000 tokens and no image, a micro-batch is one sample; bf16 takes 2 bytes.
"""

import math

import pytest

from megatron_croc.config.run import RunConfig
from megatron_croc.planning.gpus import Gpu
from megatron_croc.planning.step_time import StepTime, estimate_step
from megatron_croc.planning.workload import Workload
from megatron_croc.recipes import get_recipe

GPU = Gpu(
    name="made-up",
    memory=1e12,
    memory_rate=1e12,
    peak=1e12,
    efficiency=0.5,
    efficiency_source="made up",
    link=1e9,
    network=1e8,
)
LOAD = Workload(lengths=(1000.0,), images=0.0, peak_tokens=1000)

TOKENS = 1000
LAYER = 2 * TOKENS * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * (1000 * 1001 / 2) * 4096
"""Forward operations of one layer: two per weight and token, and attention over causal pairs."""
LOGITS = 2 * TOKENS * 4096 * 32000
LATENCY = 2e-5


def rate(width: int, tokens: int = TOKENS) -> float:
    """Operations per second: half the peak, less for thin slices and few tokens."""
    return 0.5e12 * (width / (width + 64)) * (tokens / (tokens + 128))


@pytest.fixture
def run() -> RunConfig:
    """One way of parallelism is added by each test."""
    run = get_recipe("croc_7b/finetune")
    run.model.attention_mask_type = "causal"
    run.parallel.tensor_model_parallel_size = 1
    run.parallel.sequence_parallel = False
    run.training.micro_batch_size = 1
    run.training.global_batch_size = 8
    run.training.recompute_granularity = None
    run.optimizer.overlap_grad_reduce = run.optimizer.overlap_param_gather = False
    return run


def test_compute(run: RunConfig):
    step = estimate_step(run, 1, GPU, LOAD)
    # Forward and backward are three products for each of the forward's; eight micro-batches.
    assert step.compute == pytest.approx(8 * 3 * (32 * LAYER + LOGITS) / rate(4096))
    assert step.total == step.compute
    assert step.tokens == 8 * 1000
    assert step.flops == pytest.approx(8 * 3 * (32 * LAYER + LOGITS))


def test_recomputation(run: RunConfig):
    run.training.recompute_granularity = "full"
    run.training.recompute_method = "uniform"
    step = estimate_step(run, 1, GPU, LOAD)
    assert step.recompute == pytest.approx(8 * 32 * LAYER / rate(4096))
    run.training.recompute_method, run.training.recompute_num_layers = "block", 8
    step = estimate_step(run, 1, GPU, LOAD)
    assert step.recompute == pytest.approx(8 * 8 * LAYER / rate(4096))


@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "collectives"),
    [
        (False, None, 4 + 4 / 2),  # two all-reduces each way; half of the backward's are hidden
        (True, None, 4 + 6 / 2),  # inputs are gathered again for the weights' gradients
        (True, "full", 4 + 4 + 6 / 2),  # the forward's four once more
    ],
)
def test_tensor_parallel_traffic(run: RunConfig, sequence_parallel, recompute, collectives):
    run.parallel.tensor_model_parallel_size = 4
    run.parallel.sequence_parallel = sequence_parallel
    run.training.recompute_granularity = recompute
    step = estimate_step(run, 4, GPU, LOAD)
    # 1000 tokens x 4096 x 2 bytes, of which a rank receives three quarters: 6.144 ms.
    assert step.tensor_parallel == pytest.approx(8 * 32 * collectives * (6.144e-3 + LATENCY))


def test_tensor_parallel_over_two_nodes_takes_the_network(run: RunConfig):
    run.parallel.tensor_model_parallel_size = 16
    step = estimate_step(run, 16, GPU, LOAD)
    one = 1000 * 4096 * 2 * (15 / 16) / 1e8
    assert step.tensor_parallel == pytest.approx(8 * 32 * 6 * (one + LATENCY))


def test_context_parallel_traffic(run: RunConfig):
    run.parallel.context_parallel_size = 2
    step = estimate_step(run, 2, GPU, LOAD)
    # 500 tokens a rank; q, k, v and output of 4096 each, half of which move: 8192 values.
    one = 500 * 8192 * 2 / 1e9 + 4 * LATENCY
    assert step.context_parallel == pytest.approx(8 * 32 * 3 * one)  # forward, twice backward
    run.training.recompute_granularity = "full"
    step = estimate_step(run, 2, GPU, LOAD)
    assert step.context_parallel == pytest.approx(8 * 32 * 4 * one)
    # Two key heads are not divisible by 4 ranks: keys and values of 256 come from three others.
    run.model.language_model.num_query_groups = 2
    run.parallel.context_parallel_size = 4
    step = estimate_step(run, 4, GPU, LOAD)
    one = 250 * 2 * 256 * 3 * 2 / 1e9 + 4 * LATENCY
    assert step.context_parallel == pytest.approx(8 * 32 * 4 * one)


def test_pipeline_traffic_and_bubble(run: RunConfig):
    run.parallel.pipeline_model_parallel_size = 2
    step = estimate_step(run, 2, GPU, LOAD)
    hop = 2 * 1000 * 4096 * 2 / 1e9  # hidden states forward, their gradient backward
    first, last = 3 * 16 * LAYER / rate(4096), 3 * (16 * LAYER + LOGITS) / rate(4096)
    assert step.pipeline_traffic == pytest.approx(8 * hop)
    assert step.compute == pytest.approx(8 * last)
    # The pipeline fills and drains: the other stage once, and one hop.
    assert step.bubble == pytest.approx(first + hop)
    # Two chunks a rank: twice as many hops; the bubble, hops included, is half as long.
    run.parallel.virtual_pipeline_model_parallel_size = 2
    step = estimate_step(run, 2, GPU, LOAD)
    assert step.pipeline_traffic == pytest.approx(8 * 2 * hop)
    assert step.bubble == pytest.approx((first + 2 * hop) / 2)


@pytest.mark.parametrize(("world_size", "bandwidth"), [(8, 1e9), (16, 1e8)])
def test_pipeline_hops_take_the_network_beyond_one_node(run: RunConfig, world_size, bandwidth):
    run.parallel.pipeline_model_parallel_size = 8
    run.training.global_batch_size = 16
    step = estimate_step(run, world_size, GPU, LOAD)
    micro_batches = 16 / (world_size / 8)
    assert step.pipeline_traffic == pytest.approx(micro_batches * 2 * 1000 * 4096 * 2 / bandwidth)


TRAINED = 6_738_415_616 + 20_979_712
"""Language model and projector."""


def test_data_parallel_traffic(run: RunConfig):
    # Gradients in float32 are reduced, weights in bf16 gathered: 6 bytes, 7 of 8 parts move.
    step = estimate_step(run, 8, GPU, LOAD)
    assert step.data_parallel == pytest.approx(TRAINED * 6 * (7 / 8) / 1e9)
    # Two nodes: eight adapters of 1e8 carry what their node sends.
    run.training.global_batch_size = 16
    step = estimate_step(run, 16, GPU, LOAD)
    assert step.data_parallel == pytest.approx(TRAINED * 6 * (15 / 16) / 8e8)
    run.training.bf16 = False
    step = estimate_step(run, 16, GPU, LOAD)
    assert step.data_parallel == pytest.approx(TRAINED * 8 * (15 / 16) / 8e8)


def test_overlap_hides_data_parallel_traffic_behind_one_backward_pass(run: RunConfig):
    run.optimizer.overlap_grad_reduce = True
    traffic = TRAINED * 6 * (7 / 8) / 1e9
    backward = 2 * (32 * LAYER + LOGITS) / rate(4096)
    assert backward > 0.8 * traffic
    step = estimate_step(run, 8, GPU, LOAD)
    assert step.data_parallel == pytest.approx(0.2 * traffic)
    short = Workload(lengths=(100.0,), images=0.0, peak_tokens=100)
    layer = 2 * 100 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * (100 * 101 / 2) * 4096
    backward = 2 * (32 * layer + LOGITS / 10) / rate(4096, 100)
    assert backward < 0.8 * traffic
    step = estimate_step(run, 8, GPU, short)
    assert step.data_parallel == pytest.approx(traffic - backward)


def test_imbalance_of_replicas(run: RunConfig):
    # Samples of 500 or 1500 tokens: a deviation of half the mean. Eight replicas take 4 each.
    run.training.global_batch_size = 32
    load = Workload(lengths=(500.0, 1500.0), images=0.0, peak_tokens=1500)
    step = estimate_step(run, 8, GPU, load)
    assert step.imbalance == pytest.approx(0.5 * math.sqrt(2 * math.log(8) / 4) * step.compute)
    assert estimate_step(run, 1, GPU, load).imbalance == 0


def test_imbalance_of_balanced_replicas(run: RunConfig):
    # Half of the samples have 500 tokens, half 1500: a step for eight takes groups of eight alike.
    run.training.global_batch_size = 32
    load = Workload(lengths=(500.0,) * 50 + (1500.0,) * 50, images=0.0, peak_tokens=1500)
    drawn = estimate_step(run, 8, GPU, load)
    run.data.balance_replicas = 8
    step = estimate_step(run, 8, GPU, load)
    assert step.imbalance < 0.005 * step.compute < 0.02 * drawn.imbalance
    assert estimate_step(run, 1, GPU, load).imbalance == 0
    # One sample on each replica, composed for fewer: groups of 8 of either length are in a step.
    step = estimate_step(run, 32, GPU, load)
    long, short = cost_of(1500), cost_of(500)
    assert step.imbalance == pytest.approx((2 * long / (long + short) - 1) * step.compute, rel=0.02)


def cost_of(tokens: int) -> float:
    """Operations of a sample, up to a factor."""
    layer = 2 * tokens * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * tokens * (tokens + 1) * 4096
    return 32 * layer + 2 * tokens * 4096 * 32000


def test_packs_are_balanced_as_packs(run: RunConfig):
    run.data.packing, run.data.packing_length, run.data.balance_replicas = True, 2048, 8
    run.training.global_batch_size = 32
    lengths = tuple(float(n) for n in range(100, 2000, 19))
    load = Workload(lengths=lengths, images=0.0, peak_tokens=2048)
    step = estimate_step(run, 8, GPU, load)
    assert 0 < step.imbalance < 0.02 * step.compute


def test_matching_takes_ten_milliseconds_an_image(run: RunConfig):
    run = get_recipe("croc_7b/pretrain_croc")
    run.parallel.tensor_model_parallel_size, run.parallel.sequence_parallel = 2, False
    run.training.micro_batch_size, run.training.global_batch_size = 1, 4
    load = Workload(lengths=(2000.0,), images=3.0, peak_tokens=2000)
    step = estimate_step(run, 2, GPU, load)  # 4 micro-batches; 3 images over 2 ranks: 2 on one
    assert step.matching == pytest.approx(4 * 2 * 0.01)


def test_a_tower_is_split_by_heads_or_by_images(run: RunConfig):
    run.parallel.tensor_model_parallel_size = run.parallel.context_parallel_size = 2
    load = Workload(lengths=(2000.0,), images=3.0, peak_tokens=2000)
    run.training.freeze_ViT = True
    heads = estimate_step(run, 4, GPU, load)
    run.parallel.split_vision = "images"
    images = estimate_step(run, 4, GPU, load)
    run.training.freeze_ViT = False
    trained = estimate_step(run, 4, GPU, load)
    # Features of three images, 576 x 1024 in 2 bytes: 3.54 ms for all of them over a link.
    features = 3 * 576 * 1024 * 2 / 1e9
    by_heads = 23 * 2 * 2 * (features / 2 + LATENCY)  # two all-reduces a layer
    gather = features * 3 / 4 + LATENCY
    difference = heads.tensor_parallel - images.tensor_parallel
    assert difference == pytest.approx(8 * (by_heads - gather))
    # Their sum over the two context-parallel ranks, of each tensor-parallel rank's own images.
    own = 2 * features / 2 / 2 + LATENCY
    difference = trained.tensor_parallel - images.tensor_parallel
    assert difference == pytest.approx(8 * own)
    tower = 2 * 576 * 3 * 14**2 * 1024 + 23 * (2 * 577 * 12 * 1024**2 + 4 * 577**2 * 1024)
    # Two ranks halve three images; four ranks have one image each, and one rank has none.
    difference = heads.compute - images.compute
    assert difference == pytest.approx(
        8 * tower * (3 / 2 / rate(2048, 1000) - 1 / rate(4096, 1000)), rel=1e-6
    )


def test_mfu():
    zero = dict.fromkeys(
        ("recompute", "tensor_parallel", "context_parallel", "pipeline_traffic", "matching"), 0.0
    )
    step = StepTime(
        compute=2.0,
        bubble=1.0,
        data_parallel=0.5,
        imbalance=0.5,
        tokens=1000.0,
        flops=8e12,
        **zero,
    )
    assert step.total == 4.0
    assert step.mfu(4, GPU) == 0.5  # 8e12 operations in 4 s on 4 GPUs of 1e12
