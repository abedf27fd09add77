"""Describe a checkpoint or a Hugging Face directory, without reading its tensors."""

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.base import to_yaml
from megatron_croc.config.model import CrocModelConfig, LanguageModelConfig, VisionTowerConfig
from megatron_croc.convert.configs import (
    LANGUAGE_MODELS,
    RELEASES,
    VISION_TOWERS,
    read_language_model,
    read_vision_tower,
)
from megatron_croc.convert.source import is_huggingface, open_source
from megatron_croc.convert.tensor_files import open_tensors, read_json

_Tensors = dict[str, tuple[tuple[int, ...], str, int]]
"""Shape, torch's name of the dtype, and bytes of one number."""


def inspect_folder(folder: Path) -> Iterator[str]:
    """Yield lines about the model and each tensor.

    Raises:
        CheckpointError: the folder is neither, or is damaged.
    """
    if is_huggingface(folder):
        yield from _inspect_huggingface(folder)
        return
    # A checkpoint's index is a pickle: these need torch and megatron.
    from megatron_croc.convert.checkpoint_reader import CheckpointReader
    from megatron_croc.convert.exporting import find_checkpoint, read_run

    checkpoint = find_checkpoint(folder)
    state, reader = TrainState.load(checkpoint), CheckpointReader(checkpoint)
    yield f"{checkpoint}: stage {state.stage}, iteration {state.iteration}"
    yield from _settings_lines(read_run(checkpoint).model)
    tensors: _Tensors = {
        key: (
            reader.shape(key),
            str(reader.dtype(key)).removeprefix("torch."),
            reader.dtype(key).itemsize,
        )
        for key in reader.tensors
        if not key.startswith("optimizer.")
    }
    yield from _tensor_lines(tensors)
    if len(tensors) < len(reader.tensors):
        yield f"and {len(reader.tensors) - len(tensors)} tensors of the optimizer"


def _inspect_huggingface(folder: Path) -> Iterator[str]:
    kind = read_json(folder / "config.json").get("model_type")
    yield f"{folder}: model_type {kind}"
    stored = open_tensors(folder)
    yield from _tensor_lines(
        {name: (t.shape, t.dtype_name, t.item_bytes) for name, t in stored.items()}
    )
    if kind in LANGUAGE_MODELS and kind not in RELEASES:
        yield from _settings_lines(read_language_model(folder))
        yield "a language model alone; croc convert import --vision DIR adds a vision tower"
        return
    if kind in VISION_TOWERS:
        yield from _settings_lines(read_vision_tower(folder))
        yield "a vision tower; croc convert import takes it as --vision"
        return
    source = open_source(folder)
    yield from _settings_lines(source.model)
    if source.fresh:
        yield f"not there: {', '.join(part.rstrip('.') for part in source.fresh)}"


def _settings_lines(
    model: CrocModelConfig | LanguageModelConfig | VisionTowerConfig,
) -> Iterator[str]:
    yield from ("  " + line for line in to_yaml(model).splitlines())


def _tensor_lines(tensors: _Tensors) -> Iterator[str]:
    width = max(map(len, tensors), default=0)
    for name, (shape, dtype, _) in sorted(tensors.items()):
        yield f"{name:<{width}}  {dtype:<8}  {list(shape)}"
    numbers = sum(math.prod(shape) for shape, _, _ in tensors.values())
    num_bytes = sum(math.prod(shape) * size for shape, _, size in tensors.values())
    yield f"{len(tensors)} tensors, {numbers:,} numbers, {num_bytes / 2**30:.2f} GiB"
