"""How many optimizer steps a run takes."""

from megatron_croc.config.run import RunConfig
from megatron_croc.data.order.row_plan import build_row_plan
from megatron_croc.errors import ConfigError


def resolve_train_iters(run: RunConfig) -> int:
    """`train_iters`, or as many whole global batches as `train_epochs` passes over the data give.

    With packing the rows of those passes are counted by planning them, some microseconds a sample.

    Raises:
        ConfigError: the data is smaller than one global batch.
        DataError: data missing, or without the lengths that packing needs.
    """
    training = run.training
    if training.train_iters is not None:
        return training.train_iters
    plan = build_row_plan(run, run.data.data_path, seed=training.seed)
    samples = int(plan.blend.epoch_length * training.train_epochs)
    rows = plan.num_rows(samples)
    if rows < training.global_batch_size:
        packs = f" in {rows} packs" if run.data.packing else ""
        raise ConfigError(
            f"--train-epochs {training.train_epochs} of {', '.join(run.data.data_path)} is "
            f"{samples} samples{packs}, less than --global-batch-size "
            f"{training.global_batch_size}; raise the epochs or lower the batch"
        )
    return rows // training.global_batch_size
