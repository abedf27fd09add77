"""Sizes and samples of the comparison, known to both processes.

Imported by the released code's interpreter as well, so it needs numpy and torch alone.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Peer = Literal["croc", "victor"]

IGNORE_INDEX, IMAGE_TOKEN_INDEX = -100, -200
POOL_SIZE = 2048
"""Pool tokens; the released Croc has this number in its code."""

CLIP_GRAD = 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of a model and of its micro-batch."""

    name: str
    hidden_size: int
    num_layers: int
    ffn_hidden_size: int
    num_heads: int
    vocab_size: int
    image_size: int
    vision_hidden_size: int
    vision_num_layers: int
    vision_num_heads: int
    text_lengths: tuple[int, ...]
    """Text tokens of each sample; each has one image and an answer of five sixths of its text."""

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of an image."""
        return (self.image_size // 14) ** 2

    def config(self, peer: Peer) -> dict[str, Any]:
        """Settings of both parts in Hugging Face's names, as the golden cases hold them."""
        llm = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads if peer == "croc" else self.num_heads // 2,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": 1e-5 if peer == "croc" else 1e-6,
            "rope_theta": 1e4 if peer == "croc" else 1e6,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "tokenizer_model_max_length": 2048,
            "mm_vision_select_layer": -2,
        }
        vision = {
            "hidden_size": self.vision_hidden_size,
            "intermediate_size": 4 * self.vision_hidden_size,
            "num_hidden_layers": self.vision_num_layers,
            "num_attention_heads": self.vision_num_heads,
            "image_size": self.image_size,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
        return {"llm": llm, "vision": vision}

    def with_vocabulary(self, vocab_size: int) -> "Size":
        """The same sizes with another vocabulary."""
        return replace(self, vocab_size=vocab_size)

    def to_json(self) -> dict[str, Any]:
        """Every field, for a message or a result."""
        return asdict(self)


def size_from_json(fields: dict[str, Any]) -> Size:
    """Inverse of `Size.to_json`."""
    return Size(**{**fields, "text_lengths": tuple(fields["text_lengths"])})


SIZES = {
    size.name: size
    for size in (
        Size(
            name="tiny",
            hidden_size=128,
            num_layers=4,
            ffn_hidden_size=256,
            num_heads=2,
            vocab_size=512,
            image_size=112,
            vision_hidden_size=64,
            vision_num_layers=4,
            vision_num_heads=2,
            text_lengths=(18, 24, 12, 30),
        ),
        Size(
            name="small",
            hidden_size=256,
            num_layers=4,
            ffn_hidden_size=704,
            num_heads=4,
            vocab_size=8000,
            image_size=168,
            vision_hidden_size=128,
            vision_num_layers=4,
            vision_num_heads=4,
            text_lengths=(36, 60, 42, 54),
        ),
        Size(
            name="large",
            hidden_size=384,
            num_layers=6,
            ffn_hidden_size=1024,
            num_heads=6,
            vocab_size=8000,
            image_size=224,
            vision_hidden_size=256,
            vision_num_layers=6,
            vision_num_heads=4,
            text_lengths=(72, 120, 96),
        ),
        Size(  # for a GPU: the widths of the 7B model, and as many layers as fit twice into 80 GB
            name="wide",
            hidden_size=4096,
            num_layers=8,
            ffn_hidden_size=11008,
            num_heads=32,
            vocab_size=32000,
            image_size=336,
            vision_hidden_size=1024,
            vision_num_layers=24,
            vision_num_heads=16,
            text_lengths=(230, 335, 290, 410),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One micro-batch, as the released collator gives it: ids and labels padded on the right."""

    input_ids: Tensor
    """int64 [b, L]; IMAGE_TOKEN_INDEX marks the image."""

    labels: Tensor
    """int64 [b, L]."""

    attention_mask: Tensor
    """bool [b, L], False in the padding."""

    pixel_values: Tensor
    """float32 [b, 3, height, width]."""

    seed: int
    """Seed of torch's generator right before the forward pass, which draws the replaced tokens."""

    def draw_replaced(self, num_visual_tokens: int) -> Tensor:
        """The draw of the released code for every image: bool [b, N]."""
        generator = torch.Generator().manual_seed(self.seed)
        replaced = torch.zeros(len(self.input_ids), num_visual_tokens, dtype=torch.bool)
        for row in replaced:
            order = torch.randperm(num_visual_tokens, generator=generator)
            row[order[num_visual_tokens // 4 :]] = True
        return replaced


def make_inputs(size: Size, seed: int, num_batches: int) -> Inputs:
    """Samples of step `seed`; the content repeats after `num_batches` steps, the draw does not."""
    rng = np.random.default_rng((17, seed % num_batches))
    length = max(size.text_lengths) + 1
    input_ids = torch.zeros(len(size.text_lengths), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for ids, wanted, text in zip(input_ids, labels, size.text_lengths, strict=True):
        question = text // 6
        words = torch.from_numpy(rng.integers(1, size.vocab_size, text))
        mark = torch.tensor([IMAGE_TOKEN_INDEX])
        ids[: text + 1] = torch.cat([words[:1], mark, words[1:]])
        wanted[question + 1 : text + 1] = ids[question + 1 : text + 1]
    pixels = rng.standard_normal((len(size.text_lengths), 3, size.image_size, size.image_size))
    return Inputs(
        input_ids=input_ids,
        labels=labels,
        attention_mask=input_ids != 0,
        pixel_values=torch.from_numpy(pixels).float(),
        seed=seed,
    )
