"""Comparison of an export with its checkpoint: logits of both on one image and prompt."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from megatron_croc.config.data import TemplateName
from megatron_croc.convert.exporting import find_checkpoint, read_run
from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.conversation import IMAGE_MARK
from megatron_croc.data.sample.tokenization import build_tokenizer, tokenize_prompt
from megatron_croc.errors import CheckpointError
from megatron_croc.inference.inference import build_prompt, observe_export, observe_megatron

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest difference of a logit that rounding explains, in standard deviations of the logits.

Measured on 25 random models, four small ones of each family in tests/unit/convert/families.py and
one of 16 layers of 512: at most 5e-6 in float32, and 0.06 to 0.12 in bfloat16, where transformers'
own bfloat16 is 0.06 to 0.15 from its float32. The bound in bfloat16 is twice the largest.
"""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Differences of checkpoint and export."""

    largest_difference: float
    """Largest difference of a logit."""

    mean_difference: float
    argmax_agreement: float
    """Share of positions with the same most likely token."""

    embedding_difference: float
    """Largest difference of an element of the visual tokens."""

    visual_norms: tuple[float, float, float, float]
    """Smallest and largest norm of a visual token: megatron-core's two, then transformers' two."""

    num_positions: int
    bound: float
    """Bound of largest_difference: BOUNDS times the standard deviation of the logits."""

    @property
    def passed(self) -> bool:
        """True when the difference is finite and within the bound."""
        return self.largest_difference <= self.bound

    def lines(self) -> Iterator[str]:
        """Format the report for the terminal."""
        low, high, their_low, their_high = self.visual_norms
        yield f"positions                        {self.num_positions}"
        yield f"largest difference of a logit    {self.largest_difference:.3e}"
        yield f"mean difference of the logits    {self.mean_difference:.3e}"
        yield f"same most likely token           {self.argmax_agreement:.2%}"
        yield f"largest difference, visual token {self.embedding_difference:.3e}"
        yield f"length of visual tokens          megatron-core {low:.6f} .. {high:.6f}"
        yield f"                                 transformers  {their_low:.6f} .. {their_high:.6f}"
        verdict = "PASSED" if self.passed else "FAILED"
        yield f"{verdict}: the bound is {self.bound:.3g}"


def verify_export(
    checkpoint: Path,
    export: Path,
    *,
    image: Path | None = None,
    prompt: str = "Describe the picture in detail.",
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> VerifyReport:
    """Compare a checkpoint with its export.

    Args:
        checkpoint: a checkpoint, or a folder of them.
        export: the default export's directory.
        image: image file; None: random pixels.
        prompt: question about the image; used with a tokenizer.
        tokenizer: SentencePiece file or Hugging Face directory; None: random ids.
        dtype: of both computations.

    Raises:
        CheckpointError: checkpoint or export cannot be read.
    """
    checkpoint = find_checkpoint(checkpoint)
    run = read_run(checkpoint)
    encoded = _made_up_image() if image is None else image.read_bytes()
    if tokenizer is None:
        ids = _made_up_ids(run.model.language_model.vocab_size)
    else:
        ids = _prompt_ids(prompt, tokenizer, run.data.conversation_template)
    made = build_prompt(run.model.vision_tower, ids, [encoded])
    ours = observe_megatron(checkpoint, made, dtype)
    theirs = observe_export(export, run.model, made, dtype)
    if ours.logits.shape != theirs.logits.shape:
        raise CheckpointError(
            f"{export}: logits {tuple(theirs.logits.shape)}, {checkpoint}: "
            f"{tuple(ours.logits.shape)}; they are different models"
        )
    difference = (ours.logits - theirs.logits).abs()
    norms = [side.visual_embeddings.norm(dim=-1) for side in (ours, theirs)]
    low, high, their_low, their_high = (float(f()) for n in norms for f in (n.min, n.max))
    agree = ours.logits.argmax(-1) == theirs.logits.argmax(-1)
    moved = ours.visual_embeddings - theirs.visual_embeddings.view_as(ours.visual_embeddings)
    return VerifyReport(
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        argmax_agreement=float(agree.float().mean()),
        embedding_difference=float(moved.abs().max()),
        visual_norms=(low, high, their_low, their_high),
        num_positions=len(agree),
        bound=BOUNDS[dtype] * float(theirs.logits.std()),
    )


def _prompt_ids(prompt: str, tokenizer: Path, template: TemplateName) -> np.ndarray:
    """Token ids of a prompt, int64 [T], with IMAGE_TOKEN_INDEX once."""
    kind: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"]
    kind = "HuggingFaceTokenizer" if tokenizer.is_dir() else "SentencePieceTokenizer"
    question = prompt if IMAGE_MARK in prompt else f"{IMAGE_MARK}\n{prompt}"
    return tokenize_prompt(build_tokenizer(kind, str(tokenizer)), template, question)


def _made_up_ids(vocab_size: int) -> np.ndarray:
    """Random token ids, int64 [32], with IMAGE_TOKEN_INDEX once."""
    drawn = np.random.default_rng(0).integers(0, vocab_size, 32)
    drawn[4] = IMAGE_TOKEN_INDEX
    return drawn


def _made_up_image() -> bytes:
    """Random pixels as PNG, wider than high, so that padding is tested."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
