"""Settings of batches, precision, freezing, validation and optimizer."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class TrainingConfig:
    """Batch sizes, length, precision, frozen parts, recomputation and validation."""

    micro_batch_size: int = 1
    """Samples of one forward pass on one replica."""

    global_batch_size: int = 128
    """Samples of one optimizer step."""

    train_iters: int | None = None
    """Number of optimizer steps; None: computed from train_epochs."""

    train_epochs: float = 1.0
    """Epochs over the training data; used if train_iters is None."""

    seed: int = 1234
    """Seed of all random draws."""

    deterministic: bool = False
    """Use only operations that give the same bits each time: on GPUs too, a run that is resumed at
    its own layout then equals one without a break. Slower; an operation without such a kernel is an
    error. On a CPU a run is repeatable without it."""

    bf16: bool = True
    """bfloat16 parameters and activations with fp32 main weights; False: fp32 throughout."""

    transformer_impl: Literal["auto", "local", "te"] = "auto"
    """Layers of language model and vision tower. te: Transformer Engine's (norms fused into linear
    layers, fp8). local: megatron-core's. auto: te if it runs on this device, else local."""

    bias_swiglu_fusion: bool = True
    """Compute SwiGLU in one compiled kernel on a GPU, which saves activation memory."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Matrix products of the language model in fp8 (needs Transformer Engine): e4m3 throughout,
    hybrid: e5m2 for gradients; None: bf16."""

    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """Scaling of fp8. tensorwise: by the current maximum of a tensor (H100). blockwise: blocks of
    128 (H100). mxfp8: the hardware's blocks of 32 (Blackwell)."""

    first_last_layers_bf16: bool = False
    """With fp8_format: keep the language model's first and last layer in bf16."""

    freeze_LM: bool = False
    """Freeze the language model."""

    freeze_ViT: bool = True
    """Freeze the vision tower."""

    freeze_projector: bool = False
    """Freeze the projector."""

    loss_reduction: Literal["global", "micro_batch"] = "global"
    """global: each loss is divided by its count over the global batch, independent of the layout.
    micro_batch: mean of micro-batch means, as in the released code."""

    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations to recompute in the backward pass. selective: core attention. full: all of a
    layer."""

    recompute_method: Literal["uniform", "block"] = "uniform"
    """Layers to recompute with `full`. uniform: chunks of layers. block: the first layers of each
    pipeline stage."""

    recompute_num_layers: int = 1
    """Number of layers with `full`: per chunk (uniform) or per pipeline stage (block)."""

    logits_chunk: int = 8192
    """Labelled positions whose logits are computed at once. A pack with more of them is computed in
    chunks, whose logits are computed again in the backward pass: this bounds their memory."""

    recompute_vision: bool = False
    """Recompute the activations of the vision tower in the backward pass, if it is trained."""

    eval_interval: int = 0
    """Optimizer steps between validations; 0: no validation."""

    eval_iters: int = 10
    """Number of global batches of one validation, the same samples every time."""

    eval_answers_iters: int = 0
    """Number of global batches whose answers are checked at each validation: the share that greedy
    generation with the causal mask, as in an export, gives word for word; 0: none."""

    eval_tasks: tuple[str, ...] = ()
    """Task files (croc eval) whose questions are answered by generation while training."""

    eval_tasks_interval: int = 0
    """Optimizer steps between evaluations of eval_tasks; 0: save_interval. The last step is
    evaluated too."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with a learning rate per part of the model, and the schedule."""

    lr: float = 2e-5
    """Peak learning rate of the language model and of parts without their own rate."""

    min_lr: float = 0.0
    """Final learning rate; parts with their own rate end at the same fraction of it."""

    projector_lr: float | None = None
    """Peak learning rate of the projector; None: lr."""

    prompt_pool_lr: float | None = None
    """Peak learning rate of the prompt pool; None: lr."""

    reconstruction_head_lr: float | None = None
    """Peak learning rate of the reconstruction head; None: lr."""

    vision_lr: float | None = None
    """Peak learning rate of the vision tower; None: lr."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""

    lr_warmup_fraction: float = 0.03
    """Share of the run over which the learning rate rises from 0."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms, biases and the prompt pool have none."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.999
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Epsilon of Adam."""

    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""

    use_distributed_optimizer: bool = True
    """Cut optimizer state over the data-parallel ranks; always on (a flag of megatron)."""

    optimizer_cpu_offload: bool = False
    """Keep optimizer state on the host; not supported (a flag of megatron, see checks.py)."""

    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""

    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass."""
