"""Run one prompt with images in megatron-core and, as an export, in transformers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_croc.checkpoint.sharded import load_weights
from megatron_croc.config.model import CrocModelConfig, VisionTowerConfig
from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.convert.export_loader import load_export
from megatron_croc.convert.exporting import read_run
from megatron_croc.convert.importing import one_process
from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.model.interface import ModelInputs, ModelOutput
from megatron_croc.model.transformer_configs import language_model_config
from megatron_croc.ops.mixed_mask import MixedMask


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Input of both models."""

    input_ids: Tensor
    """int64 [T], IMAGE_TOKEN_INDEX at visual positions."""

    pixel_values: Tensor
    """uint8 [n, 3, height, width]."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Outputs of one model, float32."""

    logits: Tensor
    """[T, C]."""

    visual_embeddings: Tensor
    """[n, N, D], the input of the language model."""


def build_prompt(vision: VisionTowerConfig, ids: np.ndarray, images: list[bytes]) -> Prompt:
    """Build a prompt from ids with IMAGE_TOKEN_INDEX once per image, and encoded images.

    Raises:
        ImageError: an image does not decode.
    """
    repeats = np.where(ids == IMAGE_TOKEN_INDEX, vision.num_visual_tokens, 1)
    transform = ImageTransform.build(vision, "pad")
    return Prompt(
        input_ids=torch.from_numpy(np.repeat(ids, repeats)),
        pixel_values=torch.stack([transform.decode_with_pil(image) for image in images]),
    )


@torch.no_grad()
def observe_megatron(checkpoint: Path, prompt: Prompt, dtype: torch.dtype) -> Observation:
    """Run a checkpoint of any layout in this process, as in finetune: causal, without pool."""
    run = read_run(checkpoint)
    run.stage, run.parallel = "finetune", ParallelConfig()
    run.model.attention_mask_type = "causal"
    run.training.bf16 = dtype == torch.bfloat16
    with one_process(seed=run.training.seed) as pg:
        model = CrocModel(
            run,
            language_model_config(
                run.model.language_model, parallel=run.parallel, training=run.training
            ),
            pg,  # type: ignore[arg-type]
            pre_process=True,
            post_process=True,
        )
        load_weights(checkpoint, [model], pg)  # type: ignore[arg-type]
        model.eval()
        seen: list[Tensor] = []
        assert model.projector is not None
        model.projector.register_forward_hook(lambda *call: seen.append(call[-1]))
        ids, n = prompt.input_ids, run.model.vision_tower.num_visual_tokens
        starts = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten()[::n]
        output = model(
            ModelInputs(
                input_ids=ids,
                labels=None,
                mixed_mask=MixedMask.build([0, len(ids)], []),
                image_starts=starts,
                replaced=torch.zeros(len(starts), n, dtype=torch.bool),
                pixel_values=prompt.pixel_values,
            )
        )
    assert isinstance(output, ModelOutput) and output.logits is not None
    vocab_size = run.model.language_model.vocab_size
    return Observation(
        logits=output.logits.float()[..., :vocab_size].reshape(-1, vocab_size),
        visual_embeddings=seen[0].float(),
    )


@torch.no_grad()
def observe_export(
    folder: Path, config: CrocModelConfig, prompt: Prompt, dtype: torch.dtype
) -> Observation:
    """Run an export in transformers."""
    model, vision = load_export(folder, dtype), config.vision_tower
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in (vision.image_mean, vision.image_std))
    pixels = ((prompt.pixel_values.float() / 255.0 - mean) / std).to(dtype)
    ids = prompt.input_ids.clone()
    ids[ids == IMAGE_TOKEN_INDEX] = model.config.image_token_id
    seen: list[Tensor] = []
    model.model.multi_modal_projector.register_forward_hook(lambda *call: seen.append(call[-1]))
    logits = model(input_ids=ids[None], pixel_values=pixels).logits[0]
    return Observation(
        logits=logits[:, : config.language_model.vocab_size].float(),
        visual_embeddings=seen[0].float(),
    )
