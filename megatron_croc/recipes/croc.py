"""Croc: CLIP ViT-L/14 at 336 pixels and Vicuna v1.5, as published, for one node of 8 x 80 GB.

Sizes are those of the published checkpoints; learning rates and batch sizes are in stages.py.
Parallel sizes are our own (the released scripts use ZeRO). With them a micro-batch of samples of
seq_length tokens fits without recomputation; `croc check` shows the estimate.
"""

from megatron_croc.config.run import RunConfig, Stage
from megatron_croc.recipes.stages import STAGES


def croc_7b(stage: Stage) -> RunConfig:
    """Croc-7B (Vicuna-7B-v1.5), the model of the paper's main tables."""
    run = RunConfig()  # the default sizes are those of this model
    STAGES[stage](run)
    run.data.num_workers = 8
    if stage == "pretrain_mlp":  # frozen weights carry no gradients or optimizer state
        run.training.micro_batch_size = 4
        return run
    run.parallel.tensor_model_parallel_size = 2
    run.parallel.sequence_parallel = True
    run.training.micro_batch_size = 2 if stage == "pretrain_croc" else 4
    return run


def croc_13b(stage: Stage) -> RunConfig:
    """Croc-13B (Vicuna-13B-v1.5)."""
    run = croc_7b(stage)
    llm = run.model.language_model
    llm.num_layers = 40
    llm.hidden_size = 5120
    llm.ffn_hidden_size = 13824
    llm.num_attention_heads = llm.num_query_groups = 40
    run.parallel.tensor_model_parallel_size = 2 if stage == "pretrain_mlp" else 4
    run.parallel.sequence_parallel = True
    return run
