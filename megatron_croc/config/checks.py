"""Checks of a whole run: batches, optimization, data and folders.

`find_faults` lists settings that cannot work, `find_warnings` settings that work but are probably a
mistake. Each line names the setting, its value and the way out. Checks of sizes and processes are
in layout_checks.py, checks of logging in logging_checks.py, of files in file_checks.py.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_croc.config.base import raise_faults
from megatron_croc.config.file_checks import find_missing_inputs, find_unwritable_folders
from megatron_croc.config.fp8 import fp8_gathered_unit, fp8_unit
from megatron_croc.config.layout_checks import find_layout_faults
from megatron_croc.config.logging_checks import find_logging_faults
from megatron_croc.config.reliability import WATCHDOG_MARGIN
from megatron_croc.config.run import RunConfig
from megatron_croc.log import get_logger, log_on_rank_zero


def check_run(run: RunConfig, world_size: int, *, for_training: bool = False) -> None:
    """Refuse a run that cannot work, and log warnings.

    Args:
        run: the complete configuration.
        world_size: number of processes.
        for_training: also require that data, tokenizer and initial weights exist, and that the
            folders of the run can be written.

    Raises:
        ConfigError: the run has faults; one line each.
    """
    raise_faults(find_faults(run, world_size, for_training=for_training))
    for line in find_warnings(run, for_training=for_training):
        log_on_rank_zero(get_logger(__name__), logging.WARNING, "%s", line)


def find_faults(run: RunConfig, world_size: int, *, for_training: bool = False) -> list[str]:
    """List all faults of a run, one line each."""
    faults = [
        *find_layout_faults(run, world_size),
        *_training_faults(run),
        *_order_faults(run),
        *_precision_faults(run),
        *_optimizer_faults(run),
        *_croc_faults(run),
        *_timeout_faults(run),
        *_checkpoint_faults(run),
        *find_logging_faults(run, world_size, for_training=for_training),
    ]
    if for_training:
        faults += [*find_missing_inputs(run), *find_unwritable_folders(run)]
    return faults


def _training_faults(run: RunConfig) -> Iterator[str]:
    training = run.training
    for name, value in {
        "train_iters": training.train_iters,
        "train_epochs": training.train_epochs,
        "recompute_num_layers": training.recompute_num_layers,
        "logits_chunk": training.logits_chunk,
        "eval_iters": training.eval_iters,
        "log_interval": run.logging.log_interval,
        "save_interval": run.checkpoint.save_interval,
        "keep_last": run.checkpoint.keep_last,
        "keep_every": run.checkpoint.keep_every,
        "prefetch_factor": run.data.prefetch_factor,
        "distributed_timeout_minutes": run.parallel.distributed_timeout_minutes,
        "stall_timeout_minutes": run.reliability.stall_timeout_minutes,
        "first_step_timeout_minutes": run.reliability.first_step_timeout_minutes,
        "exit_duration_in_mins": run.reliability.exit_duration_in_mins,
        "exit_interval": run.reliability.exit_interval,
    }.items():
        if value is not None and value <= 0:
            yield f"{name}={value}: must be positive"
    for name, value in {
        "eval_interval": training.eval_interval,
        "eval_answers_iters": training.eval_answers_iters,
        "eval_tasks_interval": training.eval_tasks_interval,
        "num_workers": run.data.num_workers,
    }.items():
        if value < 0:
            yield f"{name}={value}: must not be negative; 0 turns it off"
    if training.eval_interval > 0 and not run.data.valid_data_path:
        yield (
            f"eval_interval={training.eval_interval} without valid_data_path: "
            "give shards to validate on, or set eval_interval to 0"
        )
    if (skips := run.reliability.max_consecutive_skips) < 0:
        yield f"max_consecutive_skips={skips}: must not be negative; 0 ends the run at the first"
    factor = run.reliability.spike_factor
    if factor != 0 and factor <= 1:
        yield f"spike_factor={factor}: must be above 1; 0 turns it off"
    if training.eval_answers_iters > 0 and training.eval_interval == 0:
        yield (
            f"eval_answers_iters={training.eval_answers_iters} without validation: set "
            "eval_interval, or eval_answers_iters to 0"
        )
    if training.eval_answers_iters > 0 and run.reconstructs:
        yield (
            f"eval_answers_iters={training.eval_answers_iters} with stage={run.stage}, whose model "
            "replaces visual tokens: check answers in finetune, or with croc generate"
        )
    if training.eval_tasks_interval > 0 and not training.eval_tasks:
        yield (
            f"eval_tasks_interval={training.eval_tasks_interval} without eval_tasks: name task "
            "files, or set eval_tasks_interval to 0"
        )
    if training.eval_tasks and run.reconstructs:
        yield (
            f"eval_tasks with stage={run.stage}, whose model replaces visual tokens: evaluate in "
            "finetune, or with croc eval"
        )
    stages = run.parallel.pipeline_layers(run.model.language_model.num_layers)
    if (
        training.recompute_granularity == "full"
        and training.recompute_method == "block"
        and training.recompute_num_layers > min(stages, default=1)
    ):
        yield (
            f"recompute_num_layers={training.recompute_num_layers}: a pipeline stage has only "
            f"{min(stages, default=1)} layers; lower it"
        )
    if not run.reconstructs and trains_nothing(run):
        yield (
            f"freeze_LM, freeze_ViT and freeze_projector are all set and stage={run.stage} "
            "trains nothing else: unset one"
        )


def _order_faults(run: RunConfig) -> Iterator[str]:
    """Find faults of packing, grouping and balancing."""
    data = run.data
    if data.packing and data.group_by_modality_length:
        yield (
            "packing and group_by_modality_length exclude each other: packs are equally long "
            "already; unset one"
        )
    if data.packing_length is not None and data.packing_length < data.seq_length:
        yield (
            f"packing_length={data.packing_length}: a sample may have seq_length="
            f"{data.seq_length} tokens and is never cut to fit a pack; raise packing_length or "
            "lower seq_length"
        )
    replicas, batch = data.balance_replicas, run.training.global_batch_size
    if replicas is not None and (replicas < 1 or batch % replicas):
        yield (
            f"balance_replicas={replicas}: must be a positive divisor of "
            f"global_batch_size={batch}, which is composed of groups of as many packs; set it to "
            "the number of data-parallel replicas, or to none"
        )
    if data.packing_buffer_size < 1:
        yield f"packing_buffer_size={data.packing_buffer_size}: must be positive"


def _precision_faults(run: RunConfig) -> Iterator[str]:
    training, llm = run.training, run.model.language_model
    if training.fp8_format is None:
        return
    if not training.bf16:
        yield f"fp8_format={training.fp8_format} without bf16: set bf16, or unset fp8_format"
    if training.transformer_impl == "local":
        yield (
            f"fp8_format={training.fp8_format} with transformer_impl=local: fp8 is Transformer "
            "Engine's; set transformer_impl to te, or unset fp8_format"
        )
    tp = run.parallel.tensor_model_parallel_size
    unit, gathered = fp8_unit(training), fp8_gathered_unit(training, run.parallel)
    for name, size in {
        "hidden_size": llm.hidden_size,
        "ffn_hidden_size": llm.ffn_hidden_size,
    }.items():
        if size % (unit * tp):
            yield (
                f"{name}={size}: fp8_recipe={training.fp8_recipe} takes multiples of {unit} on "
                f"each of {tp} tensor-parallel ranks; unset fp8_format"
            )
    if llm.hidden_size % gathered:
        yield (
            f"hidden_size={llm.hidden_size}: fp8_recipe={training.fp8_recipe} with "
            f"sequence_parallel takes multiples of {gathered}; use fp8_recipe=tensorwise"
        )


def trains_nothing(run: RunConfig) -> bool:
    """Return True if all parts that exist in every stage are frozen."""
    training = run.training
    return training.freeze_LM and training.freeze_ViT and training.freeze_projector


def _optimizer_faults(run: RunConfig) -> Iterator[str]:
    optimizer, training = run.optimizer, run.training
    rates = {
        "lr": optimizer.lr,
        "projector_lr": optimizer.projector_lr,
        "prompt_pool_lr": optimizer.prompt_pool_lr,
        "reconstruction_head_lr": optimizer.reconstruction_head_lr,
        "vision_lr": optimizer.vision_lr,
    }
    for name, rate in rates.items():
        if rate is not None and rate <= 0:
            yield f"{name}={rate}: must be positive; freeze a part to keep it unchanged"
    if not 0 <= optimizer.min_lr <= optimizer.lr:
        yield f"min_lr={optimizer.min_lr}: must lie between 0 and lr={optimizer.lr}"
    if not 0 <= optimizer.lr_warmup_fraction < 1:
        yield f"lr_warmup_fraction={optimizer.lr_warmup_fraction}: must be in [0, 1)"
    for name, beta in {
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
    }.items():
        if not 0 <= beta < 1:
            yield f"{name}={beta}: must be in [0, 1)"
    if optimizer.adam_eps <= 0:
        yield f"adam_eps={optimizer.adam_eps}: must be positive"
    for name, value in {
        "weight_decay": optimizer.weight_decay,
        "clip_grad": optimizer.clip_grad,
    }.items():
        if value < 0:
            yield f"{name}={value}: must not be negative; 0 turns it off"
    for frozen, flag, name in (
        (training.freeze_ViT, "freeze_ViT", "vision_lr"),
        (training.freeze_projector, "freeze_projector", "projector_lr"),
    ):
        if frozen and rates[name] is not None:
            yield (
                f"{name}={rates[name]} for a part that {flag} keeps from training: "
                f"set {name} to none, or unset {flag}"
            )
    if optimizer.optimizer_cpu_offload:
        yield (
            "optimizer_cpu_offload=True: megatron's hybrid optimizer never copies the loaded "
            "weights to the host, so its first step throws them away, and it cannot resume; leave "
            "it off and use more data-parallel ranks, which share the optimizer's state"
        )
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        yield "overlap_param_gather needs overlap_grad_reduce: set both or neither"
    if not optimizer.use_distributed_optimizer:
        yield "use_distributed_optimizer=False: there is no other optimizer here; leave it on"


def _croc_faults(run: RunConfig) -> Iterator[str]:
    """Find faults of the prompt pool and its loss; only in stages that reconstruct."""
    if not run.reconstructs:
        return
    pool, reconstruction = run.model.prompt_pool, run.model.reconstruction
    if pool.pool_size < 1:
        yield f"pool_size={pool.pool_size}: must be positive"
    if not 0 < pool.replace_ratio < 1:
        yield f"replace_ratio={pool.replace_ratio}: must lie between 0 and 1, both excluded"
    elif pool.assign_mode == "hungarian" and pool.pool_size < run.model.num_replaced_tokens:
        yield (
            f"pool_size={pool.pool_size}: assign_mode=hungarian gives each of the "
            f"{run.model.num_replaced_tokens} replaced tokens of an image its own pool token; "
            "raise pool_size, lower replace_ratio, or use assign_mode=nearest"
        )
    if reconstruction.smooth_l1_beta <= 0:
        yield f"smooth_l1_beta={reconstruction.smooth_l1_beta}: must be positive"
    if reconstruction.reconstruction_loss_weight < 0:
        yield (
            f"reconstruction_loss_weight={reconstruction.reconstruction_loss_weight}: "
            "must not be negative"
        )
    if not 0 <= reconstruction.reconstruction_dropout < 1:
        yield f"reconstruction_dropout={reconstruction.reconstruction_dropout}: must be in [0, 1)"


def _timeout_faults(run: RunConfig) -> Iterator[str]:
    """Find limits with which torch ends a collective before the watchdog can name a rank."""
    timeout = run.parallel.distributed_timeout_minutes
    for name, limit in {
        "stall_timeout_minutes": run.reliability.stall_timeout_minutes,
        "first_step_timeout_minutes": run.reliability.first_step_timeout_minutes,
    }.items():
        if timeout < WATCHDOG_MARGIN * limit:
            yield (
                f"distributed_timeout_minutes={timeout}: torch would give up before the watchdog "
                f"can name the rank that caused it; set it to {WATCHDOG_MARGIN} x {name}="
                f"{limit} = {WATCHDOG_MARGIN * limit:g} or more, or lower {name}"
            )


def _checkpoint_faults(run: RunConfig) -> Iterator[str]:
    save, start = run.checkpoint.save, run.checkpoint.pretrained_checkpoint
    if save is not None and start is not None and os.path.abspath(save) == os.path.abspath(start):
        yield (
            f"save={save} is the folder of pretrained_checkpoint: this run would overwrite the "
            "weights it starts from; save elsewhere, or use load to resume"
        )
    if run.checkpoint.keep_every is not None and run.checkpoint.keep_last is None:
        yield (
            f"keep_every={run.checkpoint.keep_every} without keep_last: nothing is ever removed; "
            "set keep_last too, or leave both out"
        )


def find_warnings(run: RunConfig, *, for_training: bool = False) -> list[str]:
    """List settings that work but are probably a mistake, one line each."""
    return list(_warnings(run, for_training=for_training))


def _warnings(run: RunConfig, *, for_training: bool) -> Iterator[str]:
    llm, data, training = run.model.language_model, run.data, run.training
    reach = int(llm.max_position_embeddings * llm.rope_scaling_factor)
    if data.seq_length > reach:
        yield (
            f"seq_length={data.seq_length}: the language model was made for {reach} positions; "
            "longer samples are extrapolated unless rope_scaling_type and its factor stretch them"
        )
    if not run.reconstructs:
        for name in ("prompt_pool_lr", "reconstruction_head_lr"):
            rate = getattr(run.optimizer, name)
            if rate is not None:
                yield f"{name}={rate} has no effect: stage={run.stage} does not reconstruct"
    if data.packing_length is not None and not data.packing:
        yield f"packing_length={data.packing_length} has no effect without packing"
    if training.recompute_vision and training.freeze_ViT:
        yield "recompute_vision has no effect: freeze_ViT keeps no activations of the tower"
    if run.model.attention_mask_type == "prefix" and data.conversation_template == "qwen_1_5":
        yield (
            "attention_mask_type=prefix with conversation_template=qwen_1_5 is nearly causal: the "
            "template supervises prompt tokens, so the prefix ends at once; use visual"
        )
    if data.valid_data_path and training.eval_interval == 0:
        yield "valid_data_path is given, but eval_interval=0 never validates"
    if not for_training:
        return
    checkpoint = run.checkpoint
    resumes = checkpoint.save is not None and any(Path(checkpoint.save).glob("iter_*"))
    if checkpoint.pretrained_checkpoint is None and checkpoint.load is None and not resumes:
        yield "pretrained_checkpoint is not given: training starts from random weights"
    if checkpoint.save is None:
        yield "save is not given: nothing of this run is kept"
