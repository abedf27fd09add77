"""Views of samples as the model sees them, as text and as HTML: tokens, labels, pixels, mask.

`croc data inspect` shows them.
"""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_croc.atomic_files import write_atomically
from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.batch_builder import BatchBuilder, build_batch_builder
from megatron_croc.data.order.row_plan import Slot
from megatron_croc.data.sample.tokenization import Tokenizer, build_tokenizer
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError
from megatron_croc.file_reading import whole_number

GREEN, GREY, IMAGE, RED, OFF = "\033[32m", "\033[90m", "\033[97;45m", "\033[31m", "\033[0m"
HIDDEN, CAUSAL, BOTH_WAYS = (247, 247, 247), (68, 119, 170), (204, 102, 119)
MASK_PIXELS = 512
"""Width in pixels up to which a short mask is enlarged."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
section { border-top: 1px solid #ddd; padding: 1em 0 }
.tokens { font: 13px/1.9 ui-monospace, monospace; overflow-wrap: anywhere }
.tokens span { border-radius: 3px; padding: 1px 2px; margin-right: 1px; color: #777;
  background: #f2f2f2 }
.tokens .label { color: #05400a; background: #c9efcd }
.tokens .image { color: #fff; background: #aa3377 }
.bad { color: #b00020 }
figure { display: inline-block; margin: 1em 1em 0 0; vertical-align: top }
figure img { max-width: 24em; image-rendering: pixelated; border: 1px solid #ddd }
figcaption { color: #777; font-size: 13px }
"""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One token, or one image's visual tokens."""

    text: str
    kind: str
    """text | label | image."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One sample, ready to be shown."""

    number: int
    sample_id: str
    fault: str | None
    """Fault of an unusable sample (training uses a placeholder for it); None: no fault."""

    pieces: list[Piece]
    summary: str
    images: list[Image.Image]
    mask: Image.Image


def view_sample(builder: BatchBuilder, tokenizer: Tokenizer, number: int) -> View:
    """Build a sample as the loader builds it."""
    batch, bad = builder.build([Slot(epoch=0, index=number)])
    supervised = batch.num_label_tokens
    length = int(batch.mixed_mask.cu_seqlens[-1])
    return View(
        number=number,
        sample_id=batch.sample_ids[0],
        fault=str(bad[0]) if bad else None,
        pieces=list(pieces_of(batch, tokenizer)),
        summary=f"{length} tokens, {supervised} supervised, {batch.num_images} image(s)",
        images=[
            Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
            for pixels in (batch.pixel_values if batch.pixel_values is not None else ())
        ],
        mask=draw_mask(batch),
    )


def pieces_of(batch: Batch, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield the tokens of the pack; kind `label` if the previous position predicts it."""
    names = {i: f"<{name.strip('<>')}>" for name, i in tokenizer.special_ids.items()}
    ids = batch.input_ids.tolist()[: int(batch.mixed_mask.cu_seqlens[-1])]
    labels = [IGNORE_INDEX, *batch.labels.tolist()]
    for token, run in groupby(range(len(ids)), key=lambda t: ids[t] == IMAGE_TOKEN_INDEX):
        positions = list(run)
        if token:
            num_images = sum(int(start) in positions for start in batch.image_starts)
            for _ in range(num_images):
                yield Piece(text=f" image {len(positions) // num_images} tokens ", kind="image")
            continue
        for position in positions:
            text = names.get(ids[position]) or tokenizer.decode([ids[position]])
            kind = "text" if labels[position] == IGNORE_INDEX else "label"
            yield Piece(text=text or "\u00b7", kind=kind)


def draw_mask(batch: Batch) -> Image.Image:
    """Draw the mask, one row per query: blue earlier visible keys, red later visible keys."""
    length = int(batch.mixed_mask.cu_seqlens[-1])
    visible = batch.mixed_mask.visible()[:length, :length].numpy()
    ahead = np.arange(length)[None, :] > np.arange(length)[:, None]
    picture = np.full((length, length, 3), HIDDEN, np.uint8)
    picture[visible] = CAUSAL
    picture[visible & ahead] = BOTH_WAYS
    scale = max(1, MASK_PIXELS // max(length, 1))
    return Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1))


def as_text(view: View, *, colour: bool) -> str:
    """Format a view for the terminal."""
    codes = {"text": GREY, "label": GREEN, "image": IMAGE}
    plain = {"text": "{}", "label": "[{}]", "image": "<{}>"}
    parts = []
    for piece in view.pieces:
        text = piece.text.replace(" ", "\u00b7") if piece.kind != "image" else piece.text
        shown = text.replace("\n", "\u21b5\n")
        parts.append(
            f"{codes[piece.kind]}{shown}{OFF}" if colour else plain[piece.kind].format(shown)
        )
    bold = "\033[1m" if colour else ""
    head = f"{bold}{view.sample_id}{OFF if colour else ''}  (number {view.number}) {view.summary}"
    if view.fault is not None:
        head += f"\n{RED if colour else ''}{view.fault}{OFF if colour else ''}"
    return head + "\n" + (" " if colour else "|").join(parts) + "\n"


def as_html(view: View) -> str:
    """Format a view as a section of the page."""
    spans = "".join(
        f'<span class="{piece.kind}">{html.escape(piece.text)}</span>'
        + ("<br>" if "\n" in piece.text else "")
        for piece in view.pieces
    )
    fault = f'<p class="bad">{html.escape(view.fault)}</p>' if view.fault else ""
    figures = "".join(
        f'<figure><img alt="" src="{as_url(picture)}"><figcaption>{caption}</figcaption></figure>'
        for picture, caption in [
            *(
                (image, f"image {i}: {image.width} x {image.height}")
                for i, image in enumerate(view.images)
            ),
            (view.mask, "mask: one row per query; blue: earlier visible keys, red: later ones"),
        ]
    )
    return (
        f"<section><h2>{html.escape(view.sample_id)}</h2>"
        f"<p>number {view.number}: {view.summary}</p>"
        f'{fault}<p class="tokens">{spans}</p>{figures}</section>'
    )


def as_url(picture: Image.Image) -> str:
    """Encode a picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def png(picture: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_page(views: Sequence[View], folder: Path) -> Path:
    """Write index.html and its pictures; return the path of index.html."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in views:
        for i, image in enumerate(view.images):
            write_atomically(folder / f"sample-{view.number}-image-{i}.png", png(image))
        write_atomically(folder / f"sample-{view.number}-mask.png", png(view.mask))
    body = "".join(map(as_html, views))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Samples</title>'
        f"<style>{STYLE}</style><h1>Samples as the model sees them</h1>"
        f"<p>The model is trained to predict the green tokens.</p>{body}</html>\n"
    )
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


def view_samples(run: RunConfig, samples: Sequence[str]) -> list[View]:
    """Build views of samples of a run's data_path, by number or by sample id.

    Raises:
        DataError: no such sample, or the data cannot be opened.
    """
    dataset = ShardedDataset(run.data.data_path, roots=run.data.data_roots)
    builder = build_batch_builder(run, run.data.data_path, pad_to_multiple_of=1)
    tokenizer = build_tokenizer(run.data.tokenizer_type, run.data.tokenizer_model)
    views = []
    for sample in samples:
        number = whole_number(sample)
        number = dataset.index_of(sample) if number is None else number
        if number >= len(dataset):
            raise DataError(f"sample {number} is not there: data_path holds {len(dataset)}")
        views.append(view_sample(builder, tokenizer, number))
    return views
