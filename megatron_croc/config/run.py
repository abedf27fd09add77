"""Configuration of one complete run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_croc.config.checkpoint import CheckpointConfig
from megatron_croc.config.data import DataConfig
from megatron_croc.config.logging import LoggingConfig
from megatron_croc.config.model import CrocModelConfig
from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.config.reliability import ReliabilityConfig
from megatron_croc.config.training import OptimizerConfig, TrainingConfig

Stage = Literal["pretrain_mlp", "pretrain_croc", "finetune"]


@dataclass(kw_only=True)
class RunConfig:
    """All settings of a run. A recipe returns one; YAML and flags change its fields."""

    stage: Stage = "pretrain_croc"
    """pretrain_mlp: train the projector. pretrain_croc: reconstruct visual tokens. finetune: train
    on instructions."""

    model: CrocModelConfig = field(default_factory=CrocModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)

    @property
    def reconstructs(self) -> bool:
        """True when visual tokens are replaced and reconstructed (stage pretrain_croc)."""
        return self.stage == "pretrain_croc"

    @property
    def log_folder(self) -> Path | None:
        """Folder of metrics, heartbeats and reports: `log_dir`, else `save`; None without both."""
        folder = self.logging.log_dir or self.checkpoint.save
        return None if folder is None else Path(folder)

    def num_microbatches(self, world_size: int) -> int:
        """Number of micro-batches of one optimizer step on each replica."""
        samples_per_pass = self.training.micro_batch_size * self.parallel.data_parallel_size(
            world_size
        )
        return self.training.global_batch_size // samples_per_pass
