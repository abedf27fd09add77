"""Settings of each training stage: trained parts, form of the data, learning rates, batch size.

Sources: the paper (arXiv 2410.14332, sections 3 and 4) and the released scripts
`pretrain_mlp.sh`, `pretrain_croc.sh` and `finetune.sh` of deepglint/Croc. Common to all three:
AdamW (0.9, 0.999), no weight decay, clipping at 1.0, cosine to 0 after 3 % warm-up, one epoch,
bf16, vision tower frozen. These are the defaults of the dataclasses.
"""

from collections.abc import Callable

from megatron_croc.config.run import RunConfig, Stage


def pretrain_mlp(run: RunConfig) -> None:
    """Stage 1: align the projector on LCS-558K; all other parts are frozen.

    Deviation: the learning rate is 1e-3, as in the paper and in LLaVA. The released code sets 1e-3
    as well, but then uses 1.5e-4 for the projector.
    """
    run.stage = "pretrain_mlp"
    run.model.attention_mask_type = "causal"
    run.data.conversation_template = "plain"
    run.data.image_aspect_ratio = "square"
    run.data.seq_length = 2048
    run.training.global_batch_size = 256
    run.training.freeze_LM = True
    run.optimizer.lr = 1e-3


def pretrain_croc(run: RunConfig) -> None:
    """Stage 1.5: reconstruct replaced visual tokens, on 1.5 M detailed captions.

    Deviations: the paper's bidirectional visual attention (`visual`), where the released code
    makes everything before the first label bidirectional (`prefix`); one-to-one matching as in
    the paper (`hungarian`), where the released code takes the nearest pool token (`nearest`).
    seq_length is 8192 as released, twice the context of Vicuna; samples are much shorter.
    """
    run.stage = "pretrain_croc"
    run.model.attention_mask_type = "visual"
    run.data.conversation_template = "v1"
    run.data.image_aspect_ratio = "pad"
    run.data.seq_length = 8192
    run.training.global_batch_size = 128
    run.optimizer.lr = 2e-5
    run.optimizer.projector_lr = 1.5e-4


def finetune(run: RunConfig) -> None:
    """Stage 2: instruction tuning on the LLaVA-665K mix, causal."""
    run.stage = "finetune"
    run.model.attention_mask_type = "causal"
    run.data.conversation_template = "v1"
    run.data.image_aspect_ratio = "pad"
    run.data.seq_length = 4096
    run.training.global_batch_size = 128
    run.optimizer.lr = 2e-5
    run.optimizer.projector_lr = 1.5e-4


STAGES: dict[Stage, Callable[[RunConfig], None]] = {
    "pretrain_mlp": pretrain_mlp,
    "pretrain_croc": pretrain_croc,
    "finetune": finetune,
}
"""Training stages, in their order."""
