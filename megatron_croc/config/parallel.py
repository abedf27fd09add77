"""Settings of the parallel layout."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the parallel axes; the data-parallel size is the world size over all of them."""

    tensor_model_parallel_size: int = 1
    """Processes that share every layer (TP)."""

    pipeline_model_parallel_size: int = 1
    """Processes that share the stack of layers (PP)."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule); None: one chunk."""

    context_parallel_size: int = 1
    """Processes that share a sequence (CP)."""

    sequence_parallel: bool = False
    """Cut activations between tensor-parallel regions along the sequence; needs TP > 1."""

    split_vision: Literal["heads", "images"] = "heads"
    """Work of the vision tower on the ranks that hold a micro-batch. heads: each tensor-parallel
    rank has a part of every layer, for all images, and context-parallel ranks repeat it. images:
    each TP x CP rank has the whole tower, and its share of the images."""

    decoder_first_pipeline_num_layers: int | None = None
    """Language-model layers of the first pipeline stage, which also runs the vision tower."""

    decoder_last_pipeline_num_layers: int | None = None
    """Language-model layers of the last pipeline stage, which also runs both losses."""

    distributed_timeout_minutes: float = 30.0
    """Longest time of a collective before torch ends the run. torch cannot name the rank that
    caused it; the watchdog of `reliability` can, so its limits must be shorter."""

    @property
    def vision_tensor_parallel_size(self) -> int:
        """Ranks that share every layer of the vision tower."""
        return self.tensor_model_parallel_size if self.split_vision == "heads" else 1

    @property
    def image_share_size(self) -> int:
        """Ranks that share the images of a micro-batch in the vision tower."""
        if self.split_vision == "heads":
            return 1
        return self.tensor_model_parallel_size * self.context_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that hold one copy of the model."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Number of copies of the model in `world_size` processes."""
        return world_size // self.model_parallel_size

    def pipeline_layers(self, num_layers: int) -> tuple[int, ...]:
        """Language-model layers of each pipeline stage, as megatron-core distributes them."""
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        given = [n for n in (first, last) if n is not None]
        num_even = self.pipeline_model_parallel_size - len(given)
        even = (num_layers - sum(given)) // num_even if num_even else 0
        middle = (even,) * num_even
        return (() if first is None else (first,)) + middle + (() if last is None else (last,))
