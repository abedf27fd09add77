"""Batch arithmetic, precision, optimisation, validation."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class TrainingConfig:
    """One training run: how many samples, in what precision, what is trained."""

    micro_batch_size: int = 1
    """Samples of one forward pass on one data-parallel rank."""

    global_batch_size: int = 128
    """Samples of one optimizer step."""

    train_iters: int | None = None
    """Optimizer steps; None: as many as train_epochs gives."""

    train_epochs: float = 1.0
    """Passes over the training data; used when train_iters is not given."""

    seed: int = 1234
    """Everything random is a function of it."""

    bf16: bool = True
    """bfloat16 parameters and activations with fp32 main weights; False: fp32 throughout."""

    transformer_impl: Literal["auto", "local", "te"] = "auto"
    """Layers of language model and vision tower: Transformer Engine's (norms fused into linear
    layers, fp8), or megatron-core's own; auto: Transformer Engine where it runs."""

    bias_swiglu_fusion: bool = True
    """On a GPU, compute SwiGLU in one compiled kernel, which keeps less for the backward pass."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Matrix products of the language model in fp8 (needs Transformer Engine): e4m3 throughout,
    hybrid: e5m2 for gradients; None: bf16."""

    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How fp8 is scaled: per tensor by its current maximum (H100), by blocks of 128 (H100), or in
    the hardware's blocks of 32 (Blackwell)."""

    first_last_layers_bf16: bool = False
    """With fp8_format: keep the language model's first and last layer in bf16."""

    freeze_LM: bool = False
    """Do not train the language model."""

    freeze_ViT: bool = True
    """Do not train the vision tower."""

    freeze_projector: bool = False
    """Do not train the projector."""

    loss_reduction: Literal["global", "micro_batch"] = "global"
    """global: each loss divided by its own count over the whole global batch, so the loss does
    not depend on the layout. micro_batch: a mean of micro-batch means, as in the released code."""

    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations to compute again in the backward pass: core attention only, or whole layers."""

    recompute_method: Literal["uniform", "block"] = "uniform"
    """With `full`: uniform chunks of layers, or the first layers of each stage."""

    recompute_num_layers: int = 1
    """With `full`: layers per chunk (uniform) or per stage (block)."""

    recompute_vision: bool = False
    """Compute the vision tower's activations again in the backward pass (when it is trained)."""

    eval_interval: int = 0
    """Optimizer steps between validations; 0: none."""

    eval_iters: int = 10
    """Global batches of one validation; always the same samples."""

    eval_answers_iters: int = 0
    """Global batches whose answers are checked at each validation: how many would the model give
    word for word (most likely token, causal mask, as an export does); 0: none."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with one learning rate per part of the model, and the schedule."""

    lr: float = 2e-5
    """Peak learning rate of the language model and of every part without a rate of its own."""

    min_lr: float = 0.0
    """Learning rate at the end; parts with a rate of their own end at the same fraction."""

    projector_lr: float | None = None
    """Peak learning rate of the projector."""

    prompt_pool_lr: float | None = None
    """Peak learning rate of the prompt pool."""

    reconstruction_head_lr: float | None = None
    """Peak learning rate of the reconstruction head."""

    vision_lr: float | None = None
    """Peak learning rate of the vision tower."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""

    lr_warmup_fraction: float = 0.03
    """Share of the run over which the learning rate rises from 0."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; never on norms, biases or the prompt pool."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.999
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Epsilon of Adam."""

    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""

    use_distributed_optimizer: bool = True
    """Cut optimizer state over the data-parallel ranks; always on, the flag is megatron's."""

    optimizer_cpu_offload: bool = False
    """Keep optimizer state on the host; always refused, the flag is megatron's (see checks.py)."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs."""
