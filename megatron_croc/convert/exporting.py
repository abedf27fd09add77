"""Export a megatron-core checkpoint of any layout as a Hugging Face directory, key by key.

    croc       CrocForConditionalGeneration: remote code, processor, model card (the default)
    release    the layout of the released Croc, ViCToR and LLaVA-1.5

Builds no model and no process group; holds one tensor in memory. The directory is written under a
temporary name and renamed when it is complete.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_croc.checkpoint.manifest import find_damage
from megatron_croc.checkpoint.state import TrainState, latest_checkpoint
from megatron_croc.config.base import apply_changes, changes_from_tree, raise_faults, read_yaml
from megatron_croc.config.model import CrocModelConfig, VisionTowerConfig
from megatron_croc.config.run import RunConfig
from megatron_croc.convert.checkpoint_reader import CheckpointReader
from megatron_croc.convert.export_config import (
    croc_config,
    processor_configs,
    release_config,
    table_rows,
)
from megatron_croc.convert.model_card import write_model_card
from megatron_croc.convert.names import CROC, EXPORT, VICTOR, Layout, Rule, build_rules
from megatron_croc.convert.safetensors_writer import Group, write_sharded
from megatron_croc.convert.staging import staged_directory
from megatron_croc.convert.tokenizer_files import (
    ImageToken,
    check_same_tokenizer,
    copy_tokenizer,
    write_tokenizer,
)
from megatron_croc.errors import CheckpointError

ExportLayout = Literal["croc", "release"]

TRAINING_PARTS = ("prompt_pool.", "reconstruction_head.")
"""Parts that inference does not use."""

_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_OUTPUT = "language_model.output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Summary of an export."""

    folder: Path
    checkpoint: Path
    num_tensors: int
    num_bytes: int
    left_out: tuple[str, ...]
    """megatron keys of training-only tensors that were not exported."""


def find_checkpoint(folder: Path) -> Path:
    """Return a checkpoint's folder itself, or the latest in a folder of checkpoints.

    Raises:
        CheckpointError: no checkpoint was found.
    """
    if (found := latest_checkpoint(folder)) is None:
        raise CheckpointError(f"{folder}: no checkpoint there")
    return found


def read_run(checkpoint: Path) -> RunConfig:
    """Read the run that wrote a checkpoint; ConfigError if its run.yaml is not readable."""
    run, faults = RunConfig(), []
    path = checkpoint / "run.yaml"
    changes = changes_from_tree(RunConfig, read_yaml(path), faults, source=str(path))
    raise_faults(faults)
    apply_changes(run, changes)
    return run


def export_huggingface(
    checkpoint: Path,
    out: Path,
    *,
    layout: ExportLayout = "croc",
    training_parts: bool = False,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 * 10**9,
) -> ExportReport:
    """Write a directory that `from_pretrained` loads.

    Args:
        checkpoint: a checkpoint, or a folder of them (the latest is taken).
        out: must not exist.
        layout: `croc` or `release`.
        training_parts: also write the prompt pool and the reconstruction head.
        tokenizer: SentencePiece file or Hugging Face directory; None: weights and code only.
        dtype: of all written tensors; None: as in the checkpoint.
        max_shard_bytes: largest safetensors file.

    Raises:
        CheckpointError: a tensor is missing or has no rule, `out` exists, or the disk is full. Then
            `out` is not created.
    """
    checkpoint = find_checkpoint(checkpoint)
    if damage := find_damage(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(damage[:3])}")
    run, state = read_run(checkpoint), TrainState.load(checkpoint)
    reader = CheckpointReader(checkpoint)
    names = _names(run.model, layout)
    rules = build_rules(run.model, names)
    if tokenizer is not None:
        check_same_tokenizer(tokenizer, run.data, run.model.language_model.vocab_size)
    keys, left_out = _keys(reader, run.model, rules, training_parts=training_parts)
    with staged_directory(out) as staged:
        vocab_size = run.model.language_model.vocab_size
        image = ImageToken(id=vocab_size)
        if tokenizer is not None:
            if layout == "croc":
                image = write_tokenizer(
                    tokenizer,
                    staged,
                    template=run.data.conversation_template,
                    tokenizer_type=run.data.tokenizer_type,
                )
            else:
                image = copy_tokenizer(tokenizer, staged)
        rows = table_rows(run.model, image.id) if layout == "croc" else None
        groups = list(_groups(reader, [rules[key] for key in keys], dtype, rows))
        written = groups[0].dtype
        if layout == "croc":
            groups.append(_identity_norm(run.model.vision_tower.vision_hidden_size, written))
            _write_code(staged)
            run.data.tokenizer_type = image.tokenizer_type or run.data.tokenizer_type
            config = croc_config(run.model, run.data, written, image.id)
            for file, content in processor_configs(run.model.vision_tower, run.data).items():
                _write_json(staged / file, content)
        else:
            config = release_config(run.model, written, _tower_name(run.model.vision_tower))
        _write_json(staged / "config.json", config)
        _write_json(staged / "generation_config.json", _generation_config(vocab_size, image, rows))
        total = sum(group.num_bytes for group in groups)
        with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as progress:
            digests = write_sharded(
                staged, groups, max_shard_bytes=max_shard_bytes, on_group=progress.update
            )
        write_model_card(staged, run, state, digests, layout)
    return ExportReport(
        folder=out,
        checkpoint=checkpoint,
        num_tensors=sum(len(group.names) for group in groups),
        num_bytes=total,
        left_out=left_out,
    )


def _names(model: CrocModelConfig, layout: ExportLayout) -> Layout:
    if layout == "croc":
        return EXPORT
    return VICTOR if model.language_model.add_qkv_bias else CROC


def _tower_name(vision: VisionTowerConfig) -> str:
    """Return the name of the published tower for a release's config.json."""
    if vision.vision_model_type == "clip":
        return f"openai/clip-vit-large-patch{vision.patch_dim}-{vision.img_size}"
    return f"google/siglip2-so400m-patch{vision.patch_dim}-{vision.img_size}"


def _keys(
    reader: CheckpointReader,
    model: CrocModelConfig,
    rules: dict[str, Rule],
    *,
    training_parts: bool,
) -> tuple[list[str], tuple[str, ...]]:
    """Return the keys to export and the keys left out; check that keys and rules match."""
    stored = {key for key in reader.tensors if not key.startswith("optimizer.")}
    wanted = set(rules)
    if not model.language_model.untie_embeddings_and_output_weights:
        wanted.discard(_OUTPUT)  # the embedding table is used instead
        stored.discard(_OUTPUT)
    for key in sorted(stored - wanted):
        raise CheckpointError(f"{reader.folder}: {key} has no name in Hugging Face's layout")
    for key in sorted(wanted - stored):
        if training_parts or not key.startswith(TRAINING_PARTS):
            raise CheckpointError(f"{reader.folder}: {key} is missing")
    left_out = set() if training_parts else {k for k in stored if k.startswith(TRAINING_PARTS)}
    return [key for key in rules if key in stored - left_out], tuple(sorted(left_out))


def _groups(
    reader: CheckpointReader,
    rules: Sequence[Rule],
    dtype: torch.dtype | None,
    rows: int | None,
) -> Iterator[Group]:
    """Yield the tensors to write; shapes are found by unpacking tensors on the meta device."""
    pad_to = {_EMBEDDING: rows, _OUTPUT: rows}
    for rule in rules:
        shape = reader.shape(rule.megatron)
        layers: Sequence[int | None] = range(shape[0]) if rule.has_layers else (None,)
        whole = torch.empty(shape[1:] if rule.has_layers else shape, device="meta")
        unpack = _Unpack(rule, pad_to.get(rule.megatron))
        try:
            shapes = tuple(tuple(part.shape) for part in unpack(whole))
        except RuntimeError as error:
            raise CheckpointError(
                f"{reader.folder}: {rule.megatron} has shape {shape}, which does not fit the "
                "model in run.yaml"
            ) from error
        for layer in layers:

            def load(rule: Rule = rule, layer: int | None = layer, unpack: _Unpack = unpack):
                return unpack(reader.read(rule.megatron, layer))

            yield Group(
                names=rule.names(layer),
                shapes=shapes,
                dtype=dtype or reader.dtype(rule.megatron),
                load=load,
            )


@dataclass(frozen=True)
class _Unpack:
    """Unpacking of a rule that also adds rows to vocabulary tables."""

    rule: Rule
    rows: int | None

    def __call__(self, whole: Tensor) -> list[Tensor]:
        parts = self.rule.operation.unpack(whole)
        if self.rows is None or self.rows <= parts[0].shape[0]:
            return parts
        (table,) = parts
        # New rows are the mean of all rows: a zero row has logit 0, which may exceed good tokens.
        new = table.float().mean(dim=0, keepdim=True).to(table.dtype)
        return [torch.cat([table, new.expand(self.rows - table.shape[0], -1)])]


def _identity_norm(width: int, dtype: torch.dtype) -> Group:
    """Make an identity for the norm at the end of transformers' towers."""
    prefix = EXPORT.vision_tower + "post_layernorm."
    return Group(
        names=(prefix + "weight", prefix + "bias"),
        shapes=((width,), (width,)),
        dtype=dtype,
        load=lambda: [torch.ones(width), torch.zeros(width)],
    )


def _write_code(folder: Path) -> None:
    code = files("megatron_croc.convert") / "remote_code"
    for name in ("configuration_croc.py", "modeling_croc.py"):
        (folder / name).write_text((code / name).read_text(encoding="utf-8"))


def _generation_config(vocab_size: int, image: ImageToken, rows: int | None) -> dict[str, Any]:
    config: dict[str, Any] = {"do_sample": False, "max_new_tokens": 512}
    config |= {f"{name}_token_id": value for name, value in image.specials.items()}
    if image.stops:
        config["eos_token_id"] = list(image.stops)
    if rows is not None:  # rows without a word, and the mark of the image
        num_words = vocab_size if image.num_words is None else min(image.num_words, vocab_size)
        no_words = {*range(num_words, rows), image.id}
        config["suppress_tokens"] = sorted(no_words)
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
