"""AdamW with one learning rate per part of the model, and its schedule."""

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import nn

from megatron_croc.config.parts import PARTS
from megatron_croc.config.training import OptimizerConfig
from megatron_croc.parallel.stopwatch import region
from megatron_croc.training.distributed_adam import adopt_adam
from megatron_croc.training.grad_norm import adopt_norm


def learning_rates(config: OptimizerConfig) -> dict[str, float]:
    """Peak learning rate of every part of the model."""
    own = {
        "projector": config.projector_lr,
        "prompt_pool": config.prompt_pool_lr,
        "reconstruction_head": config.reconstruction_head_lr,
        "vision_tower": config.vision_lr,
    }
    return {part: config.lr if own.get(part) is None else own[part] for part in PARTS}  # type: ignore[misc]


def build_optimizer(
    config: OptimizerConfig, chunks: list[nn.Module], pg_collection: ProcessGroupCollection
) -> MegatronOptimizer:
    """Build megatron-core's distributed AdamW.

    Args:
        config: learning rates, weight decay and Adam's constants.
        chunks: this rank's model chunks, wrapped in DistributedDataParallel.
        pg_collection: process groups.
    """
    model_config = get_model_config(chunks[0])
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=model_config.bf16,
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=config.overlap_param_gather,
        ),
        chunks,  # type: ignore[arg-type]
        config_overrides=_overrides(config),
        use_gloo_process_groups=False,
        pg_collection=pg_collection,
    )
    adopt_adam(optimizer)
    adopt_norm()
    return optimizer


def _overrides(config: OptimizerConfig) -> dict:
    """Parameter groups for megatron: one per part of the model, with and without weight decay.

    On a resume megatron identifies groups by (wd_mult, lr_mult). Each part has an lr_mult of its
    own, so that it does not get the learning rate of another part. The scheduler ignores it.
    """
    overrides = {}
    for number, (part, peak) in enumerate(learning_rates(config).items()):
        end = peak * config.min_lr / config.lr
        overrides[ParamKey(name=f"*module.{part}.*")] = {
            "max_lr": peak,
            "min_lr": end,
            "lr_mult": 1.0 + number,
            # A second entry with the same key would replace this one, so the decay is set here.
            **({"wd_mult": 0.0} if part == "prompt_pool" else {}),
        }
    one_dimensional = ParamPredicate(name="one_dimensional", fn=lambda param: param.ndim == 1)
    overrides[ParamKey(predicate=one_dimensional)] = {"wd_mult": 0.0}
    return overrides


@region("sync")
def measure_gradients(optimizer: MegatronOptimizer) -> float:
    """Norm of the whole gradient over all ranks; the gradients stay unchanged."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@region("optimizer")
def update_weights(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the gradients and step: the second half of ChainedOptimizer.step.

    `measure_gradients` is the first half; between the two, a step can still be refused.
    """
    for part in _parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,  # type: ignore[arg-type]
                part.config.clip_grad,
                grad_norm,
            )
    optimizer.step_with_ready_grads()


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def part_of_group(group: dict) -> str:
    """Part of the model whose parameters are in `group` (the inverse of `_overrides`)."""
    return PARTS[round(group["lr_mult"]) - 1]


def build_scheduler(
    config: OptimizerConfig,
    optimizer: MegatronOptimizer,
    *,
    train_iters: int,
    global_batch_size: int,
) -> OptimizerParamScheduler:
    """Learning-rate schedule: linear warm-up from 0, then the chosen decay.

    megatron counts in samples, so every length is a number of steps times the global batch size.
    """
    decay_steps = max(train_iters, 1) * global_batch_size
    warmup = min(
        round(config.lr_warmup_fraction * train_iters) * global_batch_size,
        decay_steps - global_batch_size,
    )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=max(warmup, 0),
        lr_decay_steps=decay_steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
    )
