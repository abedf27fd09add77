"""What is read, and how it becomes tokens and pixels."""

from dataclasses import dataclass
from typing import Literal

TemplateName = Literal["plain", "v1", "qwen_1_5"]


@dataclass(kw_only=True)
class DataConfig:
    """Training and validation shards, tokenizer, template and image handling."""

    data_path: tuple[str, ...] = ()
    """Folders of shards written by croc data preprocess, local or s3://bucket/prefix, shuffled
    as one; or a single YAML file that blends sources by weight."""

    valid_data_path: tuple[str, ...] = ()
    """Folders of shards the validation loss is computed on; empty: no validation."""

    eval_answers_data_path: tuple[str, ...] = ()
    """Folders of shards with the answers to check; empty: those of valid_data_path."""

    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] = (
        "SentencePieceTokenizer"
    )
    """SentencePieceTokenizer reads a .model file, HuggingFaceTokenizer a directory."""

    tokenizer_model: str | None = None
    """Path of the tokenizer."""

    conversation_template: TemplateName = "v1"
    """plain (caption only) | v1 (Vicuna) | qwen_1_5 (ChatML)."""

    seq_length: int = 2048
    """Longest sample, tokens, visual tokens included; longer ones are cut at the end."""

    packing: bool = False
    """Train on rows of several whole samples; micro_batch_size and global_batch_size then count
    rows. Needs sample lengths in the shards (croc data lengths)."""

    packing_length: int | None = None
    """With packing: tokens a row holds at most; none: seq_length."""

    packing_buffer_size: int = 4096
    """With packing: consecutive samples among which those that fill a row are looked for."""

    group_by_modality_length: bool = False
    """Make up global batches of samples with images, or of samples without, longest first, as the
    released code does. Needs sample lengths in the shards (croc data lengths)."""

    image_aspect_ratio: Literal["pad", "square"] = "pad"
    """pad: expand to a square with the mean colour. square: resize the short side and crop."""

    image_decoder: Literal["auto", "dali", "dali_gpu", "pil"] = "auto"
    """auto: DALI on the CPU where it is installed, else PIL. dali_gpu: on the GPU."""

    data_cache_dir: str | None = None
    """Local folder, shared by the processes of a node, for copies of shards from s3://."""

    data_cache_gb: float = 100.0
    """Most the cache may hold, in 10^9 bytes; shards that find no room are read in place."""

    num_workers: int = 1
    """Threads that read, tokenise and decode ahead of training; 0: in the training thread."""

    prefetch_factor: int = 2
    """Micro-batches each worker keeps ready; together never less than one step's."""

    max_bad_fraction: float = 0.01
    """Largest share of unusable samples (each is skipped and named); more of them end the run."""

    bad_sample_report: str | None = None
    """Folder for bad_samples-<rank>.jsonl, which names every unusable sample with its reason."""

    @property
    def row_length(self) -> int:
        """Most tokens of a row: one sample, or one pack of samples."""
        return (self.packing_length or self.seq_length) if self.packing else self.seq_length
