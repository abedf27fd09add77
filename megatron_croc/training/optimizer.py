"""AdamW with one learning rate per part of the model, and its schedule."""

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_croc.config.run import RunConfig
from megatron_croc.model.parameters import PARTS
from megatron_croc.model.transformer_configs import params_dtype
from megatron_croc.parallel.stopwatch import region
from megatron_croc.training.distributed_adam import adopt_adam
from megatron_croc.training.grad_norm import adopt_norm


def learning_rates(run: RunConfig) -> dict[str, float]:
    """Peak learning rate of every part."""
    config = run.optimizer
    own = {
        "projector": config.projector_lr,
        "prompt_pool": config.prompt_pool_lr,
        "reconstruction_head": config.reconstruction_head_lr,
        "vision_tower": config.vision_lr,
    }
    return {part: config.lr if own.get(part) is None else own[part] for part in PARTS}  # type: ignore[misc]


def build_optimizer(
    run: RunConfig, chunks: list[nn.Module], pg_collection: ProcessGroupCollection
) -> MegatronOptimizer:
    """megatron-core's distributed AdamW over the DDP-wrapped model chunks."""
    config = run.optimizer
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
            bf16=run.training.bf16,
            params_dtype=params_dtype(run),
            use_distributed_optimizer=True,
            overlap_param_gather=config.overlap_param_gather,
        ),
        chunks,  # type: ignore[arg-type]
        config_overrides=_overrides(run),
        use_gloo_process_groups=False,
        pg_collection=pg_collection,
    )
    adopt_adam(optimizer)
    adopt_norm()
    return optimizer


def _overrides(run: RunConfig) -> dict:
    """One group per part and per kind (decayed or not).

    After a resume megatron tells groups apart by (wd_mult, lr_mult) only; without an lr_mult of
    its own a part would come back with another part's learning rate. The scheduler ignores it.
    """
    config, overrides = run.optimizer, {}
    for number, (part, peak) in enumerate(learning_rates(run).items()):
        end = peak * config.min_lr / config.lr
        overrides[ParamKey(name=f"*module.{part}.*")] = {
            "max_lr": peak,
            "min_lr": end,
            "lr_mult": 1.0 + number,
            # Equal keys overwrite each other: the pool's decay stands here, not in one of its own.
            **({"wd_mult": 0.0} if part == "prompt_pool" else {}),
        }
    one_dimensional = ParamPredicate(name="one_dimensional", fn=lambda param: param.ndim == 1)
    overrides[ParamKey(predicate=one_dimensional)] = {"wd_mult": 0.0}
    return overrides


@region("sync")
def measure_gradients(optimizer: MegatronOptimizer) -> float:
    """Norm of the whole gradient, over all ranks; nothing is changed by it."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@region("optimizer")
def update_weights(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the measured gradients and step: the second half of ChainedOptimizer.step.

    Cut in two so that a step can be refused on all ranks while nothing is changed yet.
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
    """The part whose parameters a group holds (the inverse of `_overrides`)."""
    return PARTS[round(group["lr_mult"]) - 1]


def build_scheduler(
    run: RunConfig, optimizer: MegatronOptimizer, train_iters: int
) -> OptimizerParamScheduler:
    """Warm-up from 0, then the chosen decay; counts samples."""
    config, per_step = run.optimizer, run.training.global_batch_size
    decay_steps = max(train_iters, 1) * per_step
    warmup = min(round(config.lr_warmup_fraction * train_iters) * per_step, decay_steps - per_step)
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
