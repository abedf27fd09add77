"""Number of optimizer steps of a run."""

from megatron_croc.config.run import RunConfig
from megatron_croc.data.loader import build_train_plan
from megatron_croc.errors import ConfigError


def resolve_train_iters(run: RunConfig) -> int:
    """Number of steps: `train_iters`, or the whole global batches in `train_epochs` epochs.

    With packing the packs of those epochs are planned and counted, some microseconds per sample.

    Raises:
        ConfigError: the data is smaller than one global batch.
        DataError: data is missing, or lacks the lengths that packing needs.
    """
    training = run.training
    if training.train_iters is not None:
        return training.train_iters
    plan = build_train_plan(run)
    samples = int(plan.blend.epoch_length * training.train_epochs)
    num_packs = plan.num_packs(samples)
    if num_packs < training.global_batch_size:
        packs = f" in {num_packs} packs" if run.data.packing else ""
        raise ConfigError(
            f"--train-epochs {training.train_epochs} of {', '.join(run.data.data_path)} is "
            f"{samples} samples{packs}, less than --global-batch-size "
            f"{training.global_batch_size}; raise the epochs or lower the batch"
        )
    return num_packs // training.global_batch_size
