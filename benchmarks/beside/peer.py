"""The released code's process: run by an interpreter with the transformers version it asks for.

    cd benchmarks && PEER_PYTHON -m beside.peer      (step_beside_release.py starts it)

Nothing of the released code lies here; it is imported from the folder that the order names.
"""

import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beside.case import CLIP_GRAD, DTYPES, POOL_SIZE, Inputs, Size
from beside.worker import TakeStep, serve


def _save_tower(config: dict[str, Any], folder: Path) -> str:
    """A random CLIP in a local folder, whose name the released builder knows as CLIP."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    path = folder / "clip"
    CLIPVisionModel(CLIPVisionConfig(**config)).save_pretrained(path)
    CLIPImageProcessor(size=config["image_size"], crop_size=config["image_size"]).save_pretrained(
        path
    )
    return str(path)


def _settings(size: Size, order: dict[str, Any]) -> dict[str, Any]:
    """Configuration of the released model."""
    config = size.config(order["peer"])
    return {
        **config["llm"],
        "mm_vision_tower": _save_tower(config["vision"], Path(order["scratch"])),
        "mm_hidden_size": size.vision_hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "tokenizer_padding_side": "right",
        "use_cache": False,
    }


def _build_croc(size: Size, order: dict[str, Any]) -> nn.Module:
    # croc/mm_utils.py imports a constant from a package that is not part of the release.
    constants = types.ModuleType("llava.constants")
    constants.IMAGE_TOKEN_INDEX = -200  # type: ignore[attr-defined]
    sys.modules["llava"] = types.ModuleType("llava")
    sys.modules["llava.constants"] = constants
    from croc.model.language_model.croc_llama import (  # type: ignore[import-not-found]
        CrocConfig,
        CrocLlamaForCausalLM,
    )

    model = CrocLlamaForCausalLM(CrocConfig(**_settings(size, order), croc_stage=True))
    model.get_vision_tower().load_model()
    return model


def _build_victor(size: Size, order: dict[str, Any]) -> nn.Module:
    from llava.model.language_model.llava_qwen import (  # type: ignore[import-not-found]
        LlavaQwenConfig,
        LlavaQwenForCausalLM,
    )

    settings = _settings(size, order)
    model = LlavaQwenForCausalLM(LlavaQwenConfig(**settings, mm_pool_size=POOL_SIZE))
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    tower.requires_grad_(True)  # the script of stage 1.5 trains it
    return model


def _watch_losses(seen: dict[str, float]) -> None:
    """Keep the unweighted reconstruction loss of each step."""
    real = nn.SmoothL1Loss.forward

    def forward(self: nn.SmoothL1Loss, input: Tensor, target: Tensor) -> Tensor:
        loss = real(self, input, target)
        seen["reconstruction"] = float(loss.detach())
        return loss

    nn.SmoothL1Loss.forward = forward


def build(size: Size, order: dict[str, Any]) -> TakeStep:
    """Build the released model with the AdamW that transformers' Trainer gives it.

    In bf16 its weights and AdamW's moments are bf16: less work and memory than the release's own
    DeepSpeed, which keeps a second copy of the weights and the moments in fp32.
    """
    sys.path.insert(0, order["folder"])
    torch.manual_seed(1)  # of the weights: the control has the same
    is_croc = order["peer"] == "croc"
    model = (_build_croc if is_croc else _build_victor)(size, order).float()
    if order.get("nudge"):
        with torch.no_grad():
            model.get_parameter("model.embed_tokens.weight").mul_(1.0 + 2.0**-23)
    else:
        _save_weights(model, Path(order["weights"]))
    device, dtype = torch.device(order["device"]), DTYPES[order["dtype"]]
    model.to(device, dtype)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=order["learning_rate"],
        weight_decay=0.0,
        fused=True if device.type == "cuda" else None,
    )
    arguments: dict[str, Any] = {} if is_croc else {"victor_stage": True}
    seen: dict[str, float] = {}
    _watch_losses(seen)

    def take_step(inputs: Inputs, dropout: bool) -> dict[str, float]:
        model.train()
        if is_croc:
            model.get_submodule("transform_block").train(dropout)  # the only part with dropout
        else:  # its default, one entry, cuts the batch to one sample
            arguments["modalities"] = ["image"] * len(inputs.input_ids)
        torch.manual_seed(inputs.seed)
        output = model(
            input_ids=inputs.input_ids.to(device),
            labels=inputs.labels.to(device),
            attention_mask=inputs.attention_mask.to(device),
            images=inputs.pixel_values.to(device, dtype),
            return_dict=True,
            **arguments,
        )
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(output.loss.detach())
        reconstruction = seen["reconstruction"]
        return {
            "loss": loss,
            "reconstruction_loss": reconstruction,
            "text_loss": loss - 10.0 * reconstruction,
        }

    return take_step


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, str(path))


if __name__ == "__main__":
    serve(build)
