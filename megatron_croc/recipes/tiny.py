"""A Croc small enough to train on a laptop's CPU in seconds: tests, the quickstart, debugging."""

from megatron_croc.config.run import RunConfig, Stage
from megatron_croc.recipes.stages import STAGES


def tiny(stage: Stage) -> RunConfig:
    """Every mechanism of Croc at toy size: 64 visual tokens, two kinds of heads, fp32.

    Grouped queries and 4 layers leave room for TP 2, PP 4 and PP 2 x VPP 2; rates are higher than
    published because everything starts from random weights. The pool starts at unit length: from
    `randn` a short run never gets beyond the rows that happen to be the shortest.
    """
    run = RunConfig()
    STAGES[stage](run)
    vision = run.model.vision_tower
    vision.img_size = 112
    vision.vision_num_layers = 4
    vision.vision_hidden_size = 64
    vision.vision_ffn_hidden_size = 128
    vision.vision_num_attention_heads = 4
    llm = run.model.language_model
    llm.num_layers = 4
    llm.hidden_size = 128
    llm.ffn_hidden_size = 256
    llm.num_attention_heads = 4
    llm.num_query_groups = 2
    llm.vocab_size = 512
    run.model.prompt_pool.pool_size = 256
    run.model.prompt_pool.pool_init = "unit"
    run.data.seq_length = 512
    run.training.bf16 = False
    run.training.micro_batch_size = 4
    run.training.global_batch_size = 32
    run.optimizer.lr = 2e-3
    run.optimizer.projector_lr = 2e-3
    run.logging.log_interval = 1
    return run
