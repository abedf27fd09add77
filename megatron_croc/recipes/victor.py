"""ViCToR: SigLIP2-so400m-patch14-384 and Qwen2.5-7B-Instruct, for one node of 8 x 80 GB.

Sources: arXiv 2410.14332v4 and the released scripts stage1_pretrain_siglip,
stage1.5_caption_siglip_qwen_victor and stage2_finetune_siglip_qwen of deepglint/Victor.
"""

from megatron_croc.config.run import RunConfig, Stage
from megatron_croc.recipes.stages import STAGES


def victor_7b(stage: Stage) -> RunConfig:
    """ViCToR-7B: Croc's stages with causal attention, a linear head and a trained vision tower.

    Deviations from the released scripts: a cosine schedule with 3 % warm-up in every stage (those
    of stages 1.5 and 2 set none, and so use transformers' linear decay without warm-up); samples
    are cut at 8192 tokens there (released: 321120, in effect no limit).
    """
    run = RunConfig()
    STAGES[stage](run)
    _use_siglip2_so400m(run)
    _use_qwen2_5_7b(run)
    run.model.attention_mask_type = "causal"
    run.model.reconstruction.reconstruction_head = "linear"
    run.data.seq_length = 8192
    run.data.num_workers = 8
    run.parallel.tensor_model_parallel_size = 4  # Qwen2.5-7B has 4 key/value heads
    run.parallel.sequence_parallel = True
    if stage == "pretrain_mlp":
        run.training.micro_batch_size = 4
        return run
    run.data.conversation_template = "qwen_1_5"
    run.training.freeze_ViT = False
    run.training.micro_batch_size = 2
    run.optimizer.lr = 1e-5
    run.optimizer.projector_lr = None  # the rate of the language model
    run.optimizer.vision_lr = 2e-6
    if stage == "pretrain_croc":
        run.optimizer.prompt_pool_lr = 1.5e-4
    return run


def _use_siglip2_so400m(run: RunConfig) -> None:
    vision = run.model.vision_tower
    vision.vision_model_type = "siglip"
    vision.img_size = 384  # 27 x 27 patches of 14 cover 378; the last 6 pixels are unused, as in HF
    vision.patch_dim = 14
    vision.vision_num_layers = 27
    vision.vision_hidden_size = 1152
    vision.vision_ffn_hidden_size = 4304
    vision.vision_num_attention_heads = 16
    vision.vision_activation = "gelu_tanh"
    vision.vision_norm_epsilon = 1e-6
    vision.image_mean = (0.5, 0.5, 0.5)
    vision.image_std = (0.5, 0.5, 0.5)


def _use_qwen2_5_7b(run: RunConfig) -> None:
    llm = run.model.language_model
    llm.num_layers = 28
    llm.hidden_size = 3584
    llm.ffn_hidden_size = 18944
    llm.num_attention_heads = 28
    llm.num_query_groups = 4
    llm.vocab_size = 152064
    llm.max_position_embeddings = 32768
    llm.rotary_base = 1e6
    llm.norm_epsilon = 1e-6
    llm.add_qkv_bias = True
    run.data.tokenizer_type = "HuggingFaceTokenizer"
