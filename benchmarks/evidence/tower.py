#!/usr/bin/env python
"""A small vision tower trained on pictures and captions as CLIP was, in minutes on a CPU.

    python benchmarks/evidence/tower.py --data data/easy_vqa --out data/easy_vqa/tower

Both encoders are transformers' CLIP. Captions that are equal count as right answers of one another:
with 24 different captions a batch is full of them. OUT is a tower that `croc convert import
--vision OUT` reads; OUT/zero_shot.json has the share of held-out pictures whose own caption is the
nearest of all captions. Needs transformers.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from megatron_croc.config.model import VisionTowerConfig


def read_pairs(records: Path, images: Path) -> tuple[torch.Tensor, list[str]]:
    """Read a JSON of captions: normalised pixels [n, 3, height, width], fp32, and captions."""
    rows = json.loads(records.read_text(encoding="utf-8"))
    pixels = [np.asarray(Image.open(images / row["image"]).convert("RGB")) for row in rows]
    defaults = VisionTowerConfig()
    mean, std = torch.tensor(defaults.image_mean), torch.tensor(defaults.image_std)
    scaled = (torch.from_numpy(np.stack(pixels)) / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous(), [row["caption"] for row in rows]


def as_ids(captions: Sequence[str], words: dict[str, int]) -> torch.Tensor:
    """Turn captions into word ids [n, length], closed by the end mark (the largest id)."""
    end = len(words) + 1
    ids = [[words[word] for word in caption.split()] + [end] for caption in captions]
    longest = max(map(len, ids))
    return torch.tensor([row + [end] * (longest - len(row)) for row in ids])


def build(image_size: int, num_words: int) -> CLIPModel:
    """Build a random model: 4 layers of width 64 with patches of 8 pixels, and 2 for the text."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config={
            **sizes,
            "num_hidden_layers": 4,
            "image_size": image_size,
            "patch_size": 8,
        },
        text_config={
            **sizes,
            "num_hidden_layers": 2,
            "vocab_size": num_words + 2,
            "max_position_embeddings": 16,
            "eos_token_id": num_words + 1,
            "bos_token_id": num_words + 1,
            "pad_token_id": num_words + 1,
        },
        projection_dim=64,
    )
    return CLIPModel(config)


def contrastive_loss(model: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of pictures over texts and of texts over pictures; equal texts share it."""
    logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    equal = (ids[:, None] == ids[None]).all(-1).float()
    targets = equal / equal.sum(1, keepdim=True)
    return (
        functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)
    ) / 2


def train(
    model: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor, *, steps: int, batch: int
) -> None:
    """Train all weights with AdamW, warm-up and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(ids), (batch,))
        loss = contrastive_loss(model, pixels[chosen], ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def zero_shot(model: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> float:
    """Share of pictures whose caption is the nearest of all different captions."""
    model.eval()
    classes = torch.unique(ids, dim=0)
    right = 0
    for part, own in zip(pixels.split(256), ids.split(256), strict=True):
        nearest = model(input_ids=classes, pixel_values=part).logits_per_image.argmax(1)
        right += int((classes[nearest] == own).all(1).sum())
    return right / len(ids)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and save the tower."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by records.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tower")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    pixels, captions = read_pairs(options.data / "pretrain_mlp.json", options.data / "images")
    held_out, true = read_pairs(options.data / "valid_pretrain_mlp.json", options.data / "images")
    words = {w: i + 1 for i, w in enumerate(sorted({w for c in captions for w in c.split()}))}
    model = build(pixels.shape[-1], len(words))
    started = time.perf_counter()
    train(model, pixels, as_ids(captions, words), steps=options.steps, batch=options.batch)
    result = {
        "zero_shot_accuracy": zero_shot(model, held_out, as_ids(true, words)),
        "num_pictures": len(true),
        "num_captions": len(set(true)),
        "chance": max(map(true.count, set(true))) / len(true),
        "steps": options.steps,
        "batch": options.batch,
        "seconds": round(time.perf_counter() - started),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    save_tower(model, options.out)
    (options.out / "zero_shot.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def save_tower(model: CLIPModel, out: Path) -> None:
    """Write the vision encoder alone in Hugging Face's layout."""
    from safetensors.torch import save_file

    kept = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith("vision_model.") and "position_ids" not in name
    }
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = {**model.vision_model.config.to_dict(), "architectures": ["CLIPVisionModel"]}
    (out / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
