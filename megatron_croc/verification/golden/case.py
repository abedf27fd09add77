"""A recorded run: its files, its configuration as a RunConfig, its inputs as a batch."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_croc.config.run import RunConfig
from megatron_croc.convert.names import CROC, VICTOR, Layout
from megatron_croc.data.batch import IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.sample.collate import ReadySample, collate, expand_sample
from megatron_croc.data.sample.tokenization import TokenizedSample
from megatron_croc.errors import DataError

SPLIT_IMAGE = (
    "the released head reshapes [images * N, h] to [samples, -1, h], so a text-only sample beside "
    "an image makes it attend within pieces of images; ours groups by image"
)
"""Reason why the reconstruction of a batch with text-only samples cannot agree."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recorded run."""

    name: str
    info: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Tensor]
    layout: Layout

    @property
    def is_recorded(self) -> bool:
        """True when the reference finished (a CRASH case has inputs only)."""
        return "loss" in self.tensors

    @property
    def has_reconstruction(self) -> bool:
        """True when the reference replaced visual tokens and reconstructed them."""
        if not self.is_recorded:
            return "stage15" in self.name
        return "pool_index" in self.tensors

    @property
    def splits_images(self) -> bool:
        """True when the reference's head mixed up parts of images; see SPLIT_IMAGE."""
        has_image = (self.tensors["in_input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
        is_bert = any(name.startswith("transform_block.") for name in self.state)
        return is_bert and self.has_reconstruction and bool(has_image.any() and ~has_image.all())


def load_case(path: Path) -> Case:
    """Read a case and the weights it was recorded with."""
    path = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    for file in (path.with_suffix(".json"), path.with_suffix(".safetensors")):
        if not file.exists():
            raise DataError(f"{file}: no such file; name a case as FOLDER/CASE")
    prefixed = path.parent / f"state_{path.name.split('_')[0]}.safetensors"
    state_file = prefixed if prefixed.exists() else path.parent / "state.safetensors"
    if not state_file.exists():
        raise DataError(f"{path}: neither {prefixed.name} nor {state_file.name} lies beside it")
    state = {name: tensor.float() for name, tensor in load_file(state_file).items()}
    return Case(
        name=path.name,
        info=json.loads(path.with_suffix(".json").read_text()),
        tensors=load_file(path.with_suffix(".safetensors")),
        state=state,
        layout=VICTOR if VICTOR.prompt_pool in state else CROC,
    )


def build_run(case: Case, *, tp: int, pp: int, sequence_parallel: bool) -> RunConfig:
    """Convert the reference's configuration to a RunConfig."""
    run = RunConfig(stage="pretrain_croc" if case.has_reconstruction else "finetune")
    theirs, vision = case.info["config"]["llm"], case.info["config"]["vision"]
    llm = run.model.language_model
    llm.num_layers = theirs["num_hidden_layers"]
    llm.hidden_size = theirs["hidden_size"]
    llm.ffn_hidden_size = theirs["intermediate_size"]
    llm.num_attention_heads = theirs["num_attention_heads"]
    llm.num_query_groups = theirs["num_key_value_heads"]
    llm.kv_channels = theirs.get("head_dim")
    llm.vocab_size = theirs["vocab_size"]
    llm.norm_epsilon = theirs["rms_norm_eps"]
    llm.rotary_base = theirs["rope_theta"]
    llm.untie_embeddings_and_output_weights = not theirs.get("tie_word_embeddings", False)
    llm.add_qkv_bias = "model.layers.0.self_attn.q_proj.bias" in case.state
    scaling = theirs.get("rope_scaling") or {}
    if scaling:
        llm.rope_scaling_type = scaling.get("rope_type") or scaling["type"]
        llm.rope_scaling_factor = scaling["factor"]
    tower = run.model.vision_tower
    is_clip = f"{case.layout.vision_tower}embeddings.class_embedding" in case.state
    tower.vision_model_type = "clip" if is_clip else "siglip"
    tower.img_size, tower.patch_dim = vision["image_size"], vision["patch_size"]
    tower.vision_num_layers = vision["num_hidden_layers"]
    tower.vision_hidden_size = vision["hidden_size"]
    tower.vision_ffn_hidden_size = vision["intermediate_size"]
    tower.vision_num_attention_heads = vision["num_attention_heads"]
    tower.vision_norm_epsilon = vision["layer_norm_eps"]
    activation = vision.get("hidden_act", "quick_gelu")
    tower.vision_activation = "quick_gelu" if activation == "quick_gelu" else "gelu_tanh"
    tower.vision_select_layer = theirs.get("mm_vision_select_layer", -2)
    pool = case.state[case.layout.prompt_pool]
    run.model.prompt_pool.pool_size = pool.shape[0]
    run.model.prompt_pool.assign_mode = "hungarian" if case.layout is VICTOR else "nearest"
    is_linear = f"{case.layout.linear_head}weight" in case.state
    run.model.reconstruction.reconstruction_head = "linear" if is_linear else "bert"
    has_prefix = case.has_reconstruction and case.layout is CROC
    run.model.attention_mask_type = "prefix" if has_prefix else "causal"
    run.data.seq_length = theirs.get("tokenizer_model_max_length", 2048)
    run.training.bf16 = False
    run.training.freeze_ViT = not any(
        "vision_tower" in name for name in case.info.get("grad_norm", {})
    )
    run.training.micro_batch_size = run.training.global_batch_size = case.tensors[
        "in_input_ids"
    ].shape[0]
    run.parallel.tensor_model_parallel_size = tp
    run.parallel.pipeline_model_parallel_size = pp
    run.parallel.sequence_parallel = sequence_parallel
    return run


def build_batch(case: Case, run: RunConfig) -> Batch:
    """Collate the reference's inputs, with its pixels and its choice of replaced tokens."""
    num_visual_tokens = run.model.vision_tower.num_visual_tokens
    size = run.model.vision_tower.img_size
    samples = []
    for number, (ids, labels, real) in enumerate(
        zip(
            *(case.tensors[f"in_{k}"] for k in ("input_ids", "labels", "attention_mask")),
            strict=True,
        )
    ):
        tokens = TokenizedSample(
            sample_id=f"{case.name}[{number}]",
            input_ids=ids[real].numpy(),
            labels=labels[real].numpy(),
        )
        tokens = expand_sample(
            tokens, num_visual_tokens=num_visual_tokens, seq_length=run.data.seq_length
        )
        samples.append(ReadySample(tokens=tokens, epoch=0))
    batch = collate(
        samples,
        num_visual_tokens=num_visual_tokens,
        mask_type=run.model.attention_mask_type,
        pad_to_multiple_of=run.parallel.tensor_model_parallel_size,
        seed=0,
        replace_ratio=run.model.prompt_pool.replace_ratio if run.reconstructs else None,
        image_shape=None,
    )
    has_image = (case.tensors["in_input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
    pixels = case.tensors.get("in_pixel_values")
    if pixels is None:  # a CRASH case records none
        pixels = torch.randn(batch.num_images, 3, size, size, generator=torch.manual_seed(0))
    else:
        pixels = pixels[has_image].float()
    replaced = batch.replaced
    if "image_masked_patches" in case.tensors and run.reconstructs:
        replaced = case.tensors["image_masked_patches"][has_image]
    # Recorded in eval mode: no seeds, no dropout.
    return replace(batch, pixel_values=pixels, replaced=replaced, image_seeds=())
