"""How many optimizer steps a run takes."""

from megatron_croc.config.run import RunConfig
from megatron_croc.data.shards import count_samples
from megatron_croc.errors import ConfigError


def resolve_train_iters(run: RunConfig) -> int:
    """`train_iters`, or as many whole global batches as `train_epochs` passes over the data give.

    Raises:
        ConfigError: the data is smaller than one global batch.
    """
    training = run.training
    if training.train_iters is not None:
        return training.train_iters
    samples = int(count_samples(run.data.data_path) * training.train_epochs)
    if samples < training.global_batch_size:
        raise ConfigError(
            f"--train-epochs {training.train_epochs} of {', '.join(run.data.data_path)} is "
            f"{samples} samples, less than --global-batch-size {training.global_batch_size}; "
            "raise the epochs or lower the batch"
        )
    return samples // training.global_batch_size
