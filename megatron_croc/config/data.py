"""Settings of data, tokenizer, packing and images."""

from dataclasses import dataclass
from typing import Literal

TemplateName = Literal["plain", "v1", "qwen_1_5"]

TokenizerType = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]


@dataclass(kw_only=True)
class DataConfig:
    """Training and validation shards, tokenizer, template and image handling."""

    data_path: tuple[str, ...] = ()
    """Folders of shards written by croc data preprocess, local or s3://bucket/prefix, shuffled
    as one; or a single YAML file that blends sources by weight."""

    data_roots: tuple[str, ...] = ()
    """Folders or s3:// prefixes outside a dataset folder in which its tars may lie; needed for tars
    that croc data index left in place."""

    valid_data_path: tuple[str, ...] = ()
    """Folders of shards for the validation loss; empty: no validation."""

    eval_answers_data_path: tuple[str, ...] = ()
    """Folders of shards with answers to check; empty: the same as valid_data_path."""

    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """SentencePieceTokenizer reads a .model file, HuggingFaceTokenizer a directory."""

    tokenizer_model: str | None = None
    """Path of the tokenizer."""

    conversation_template: TemplateName = "v1"
    """plain (caption only) | v1 (Vicuna) | qwen_1_5 (ChatML)."""

    seq_length: int = 2048
    """Longest sample, in tokens with visual tokens; longer samples are cut at the end."""

    packing: bool = False
    """Fill each pack with several whole samples; micro_batch_size and global_batch_size then count
    packs. Needs sample lengths in the shards (croc data lengths)."""

    packing_length: int | None = None
    """With packing: most tokens of a pack; none: seq_length."""

    packing_buffer_size: int = 4096
    """With packing: number of consecutive samples from which packs are filled."""

    group_by_modality_length: bool = False
    """Build each global batch from samples with images or from samples without, longest first, as
    in the released code. Needs sample lengths in the shards (croc data lengths)."""

    balance_replicas: int | None = None
    """Compose steps by predicted cost, such that this many data-parallel replicas (or fewer) finish
    together, and deal them to the replicas of the run; divides global_batch_size. A run may go on
    with another number of replicas. None: off. Needs sample lengths in the shards (croc data
    lengths)."""

    image_aspect_ratio: Literal["pad", "square"] = "pad"
    """pad: expand to a square with the mean colour. square: resize the short side and crop."""

    image_decoder: Literal["auto", "dali", "dali_gpu", "pil"] = "auto"
    """auto: DALI on the CPU where it is installed, else PIL. dali_gpu: on the GPU."""

    data_cache_dir: str | None = None
    """Local folder for copies of shards from s3://, shared by the processes of a node."""

    data_cache_gb: float = 100.0
    """Size limit of the cache, 10^9 bytes; shards that do not fit are read from s3:// directly."""

    num_workers: int = 1
    """Threads that read, tokenize and decode ahead of training; 0: in the training thread."""

    prefetch_factor: int = 2
    """Micro-batches that each worker keeps ready; in total at least one step's."""

    max_bad_fraction: float = 0.01
    """Largest share of unusable samples, which are skipped and logged; more end the run."""

    bad_sample_report: str | None = None
    """Folder for bad_samples-<rank>.jsonl: every unusable sample with the reason."""

    @property
    def row_length(self) -> int:
        """Most tokens of a pack with packing, else of a sample."""
        return (self.packing_length or self.seq_length) if self.packing else self.seq_length
