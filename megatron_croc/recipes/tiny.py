"""Tiny Croc that trains on a laptop's CPU in seconds, for tests, quickstart and debugging."""

from megatron_croc.config.run import RunConfig, Stage
from megatron_croc.recipes.stages import STAGES


def tiny(stage: Stage) -> RunConfig:
    """All mechanisms of Croc at a very small size: 64 visual tokens, grouped queries, fp32.

    Heads and 4 layers allow TP 2, PP 4 and PP 2 x VPP 2. Learning rates are higher than published,
    because all weights are random. The pool tokens have unit length at the start: with `randn` a
    short run would use the shortest pool tokens only.
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
