"""Sources of an import: a whole model, or a language model and a separate vision tower."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_croc.config.model import CrocModelConfig
from megatron_croc.convert.configs import (
    EXPORT,
    LANGUAGE_MODELS,
    RELEASES,
    parse_language_model,
    read_export,
    read_release,
    read_vision_tower,
)
from megatron_croc.convert.names import CROC, SEPARATE, VICTOR, Layout, build_rules
from megatron_croc.convert.names import EXPORT as EXPORT_LAYOUT
from megatron_croc.convert.tensor_files import LazyTensors, StoredTensor, open_tensors, read_json
from megatron_croc.errors import CheckpointError, ConfigError
from megatron_croc.log import get_logger, log_on_rank_zero

if TYPE_CHECKING:  # opening reads JSON and headers; only the weights need torch and megatron
    import torch

    from megatron_croc.model.sharded_weights import Shard, WeightSource

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights under Hugging Face names, and the configuration of their model."""

    model: CrocModelConfig
    layout: Layout
    tensors: dict[str, StoredTensor]
    fresh: tuple[str, ...]
    """Parts (prefixes of megatron keys) that the source does not have."""

    is_whole: bool
    """False: a language model and a tower that were not trained together."""

    @property
    def dtype(self) -> "torch.dtype":
        """Dtype of the language model's embedding table."""
        return self.tensors[self.layout.language_model + "embed_tokens.weight"].dtype

    def weights(self, used: set[str] | None = None) -> "WeightSource":
        """Return a function shard -> whole megatron tensor; None for parts that are missing."""
        from megatron_croc.convert.state import weight_source

        rules = build_rules(self.model, self.layout)
        whole = weight_source(LazyTensors(self.tensors), rules, set() if used is None else used)
        return lambda shard: None if shard.key.startswith(self.fresh) else whole(shard)


def is_huggingface(folder: str | Path) -> bool:
    """Return True if a folder is a Hugging Face directory (has a config.json)."""
    return (Path(folder) / "config.json").is_file()


def open_source(folder: Path, vision_folder: Path | None = None) -> Source:
    """Open a Hugging Face directory; reads configuration and tensor headers, no data.

    Args:
        folder: a language model, a released Croc, ViCToR or LLaVA-1.5, or our own export.
        vision_folder: the vision tower's directory. Needed for a language model, and for a release
            whose tower is neither in its files nor known by name.

    Raises:
        CheckpointError: the architecture is unknown, or files are missing or damaged.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind == EXPORT:
        model, layout, tensors = read_export(folder), EXPORT_LAYOUT, open_tensors(folder)
    elif kind in RELEASES:
        model, tensors = read_release(folder, vision_folder), open_tensors(folder)
        layout = VICTOR if VICTOR.prompt_pool in tensors or "img_head.weight" in tensors else CROC
        if vision_folder is not None and not _has_tower(tensors, layout):
            tensors = _open_tower(vision_folder, layout) | tensors
    else:
        language_model = parse_language_model(config, folder / "config.json")
        if vision_folder is None:
            raise CheckpointError(
                f"{folder}: a language model alone ({kind}); add --vision DIR to "
                "croc convert import, a CLIP or SigLIP"
            )
        assert kind in LANGUAGE_MODELS
        vision = read_vision_tower(vision_folder)
        model = CrocModelConfig(language_model=language_model, vision_tower=vision)
        if kind == "qwen2":  # as ViCToR
            model.reconstruction.reconstruction_head = "linear"
        return Source(
            model=model,
            layout=SEPARATE,
            tensors=_open_tower(vision_folder, SEPARATE) | open_tensors(folder),
            fresh=("projector.", "prompt_pool.", "reconstruction_head."),
            is_whole=False,
        )
    fresh = _read_training_parts(model, layout, tensors)
    return Source(model=model, layout=layout, tensors=tensors, fresh=fresh, is_whole=True)


def open_weights(
    folder: str | Path, model: CrocModelConfig, *, reconstructs: bool
) -> "WeightSource":
    """Open the weights of a whole model as start of a run.

    Args:
        folder: Hugging Face directory of a whole model.
        model: configuration of the run's model.
        reconstructs: True if the run's stage uses the reconstruction head.

    Raises:
        CheckpointError: not a whole model, or a damaged one.
        ConfigError: the run's model differs in settings that change the computation; lists them.
    """
    source = open_source(Path(folder))
    differences = [
        f"{name}={ours}: {folder} has {theirs}"
        for part in ("language_model", "vision_tower")
        for name, ours, theirs in _differences(model, source.model, part)
    ]
    head, theirs = model.reconstruction.reconstruction_head, source.model.reconstruction
    has_head = "reconstruction_head." not in source.fresh
    if reconstructs and has_head and head != theirs.reconstruction_head:
        differences.append(f"reconstruction_head={head}: {folder} has {theirs.reconstruction_head}")
    if differences:
        raise ConfigError("\n".join(differences))
    missing = f"; fresh: {', '.join(p.rstrip('.') for p in source.fresh)}" if source.fresh else ""
    log_on_rank_zero(logger, 20, "taking weights from %s%s", folder, missing)
    return source.weights()


_NOT_COMPUTED = ("init_method_std", "max_position_embeddings", "vision_num_layers")


def _differences(
    ours: CrocModelConfig, theirs: CrocModelConfig, part: str
) -> list[tuple[str, object, object]]:
    """List settings of a part that change its computation with the same weights."""
    mine, other = getattr(ours, part), getattr(theirs, part)
    names = [field.name for field in dataclasses.fields(mine)]
    if part == "vision_tower":
        # The layer may be counted from either end; the number of active layers is compared.
        names = [n for n in names if n != "vision_select_layer"] + ["num_active_layers"]
    else:
        names = [n for n in names if n != "kv_channels"] + ["head_dim"]
    return [
        (name, getattr(mine, name), getattr(other, name))
        for name in names
        if name not in _NOT_COMPUTED and getattr(mine, name) != getattr(other, name)
    ]


def _has_tower(tensors: dict[str, StoredTensor], layout: Layout) -> bool:
    return any(name.startswith(layout.vision_tower) for name in tensors)


def _open_tower(folder: Path, layout: Layout) -> dict[str, StoredTensor]:
    """Open a tower's tensors under the layout's names.

    Newer versions of transformers save a tower alone without the prefix `vision_model.`.
    """
    tensors = open_tensors(folder)
    whole = "vision_model."
    if not any(name.startswith(whole) for name in tensors):
        tensors = {whole + name: tensor for name, tensor in tensors.items()}
    if layout.vision_tower == whole:
        return tensors
    return {
        layout.vision_tower + name.removeprefix(whole): tensor
        for name, tensor in tensors.items()
        if name.startswith(whole)
    }


def _read_training_parts(
    model: CrocModelConfig, layout: Layout, tensors: dict[str, StoredTensor]
) -> tuple[str, ...]:
    """Set size and kind of pool and head from the tensors; return the missing parts."""
    fresh: list[str] = []
    pool = tensors.get(layout.prompt_pool)
    if pool is not None and len(pool.shape) == 2 and pool.shape[0] < model.num_replaced_tokens:
        tensors.pop(layout.prompt_pool)  # a stub of one row, as written by stage 2 of ViCToR
        pool = None
    if pool is None:
        fresh.append("prompt_pool.")
    else:
        model.prompt_pool.pool_size = pool.shape[0]
    if any(name.startswith(layout.bert_head + "query") for name in tensors) or any(
        name.startswith(layout.bert_head + "layers.0.") for name in tensors
    ):
        model.reconstruction.reconstruction_head = "bert"
    elif any(name.startswith(layout.linear_head) for name in tensors):
        model.reconstruction.reconstruction_head = "linear"
    else:
        fresh.append("reconstruction_head.")
    return tuple(fresh)


def check_vocabulary(source: Source, shard: "Shard") -> None:
    """Check that vocabulary tables have the configured number of rows; padding would hide a fault.

    Raises:
        CheckpointError: another number of rows.
    """
    llm, layout = source.model.language_model, source.layout
    if not shard.key.startswith("language_model.") or shard.layer is not None:
        return
    for name in (layout.language_model + "embed_tokens.weight", layout.lm_head + "weight"):
        tensor = source.tensors.get(name)
        if tensor is None:
            continue
        rows, more_allowed = tensor.shape[0], layout is EXPORT_LAYOUT
        if rows < llm.vocab_size or (rows > llm.vocab_size and not more_allowed):
            raise CheckpointError(
                f"tensor {name} has {rows} rows, config.json says vocab_size {llm.vocab_size}"
            )
