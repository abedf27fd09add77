"""The look at a dataset as one HTML file: pictures inside, nothing loaded from anywhere."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from megatron_croc.data.look.strange import Strange
from megatron_croc.data.sample_view import View

TOKENS_SHOWN = 600
"""Tokens of a sample that the page shows; images count as one."""

CSS = """
body { margin: 0; background: #f6f7f9; color: #22262e; font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 64px }
h1 { font-size: 28px; margin: 0 } h2 { font-size: 19px; margin: 0 0 10px }
.lead { color: #5b6270; margin: 2px 0 0 }
section { background: #fff; border: 1px solid #e3e6eb; border-radius: 10px; padding: 18px 22px;
  margin-top: 18px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px }
.tile b { display: block; font-size: 24px; font-variant-numeric: tabular-nums }
.tile span { color: #5b6270; font-size: 13px }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 18px }
.columns section { margin-top: 0 }
.row { display: grid; grid-template-columns: 7.5em 1fr 8.5em; align-items: center; font-size: 13px;
  font-variant-numeric: tabular-nums }
.row i { display: block; height: 11px; border-radius: 3px; background: #2f6db5; min-width: 1px }
.row span:last-child { text-align: right; color: #5b6270 }
table { border-collapse: collapse; font-size: 13px; width: 100% }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid #e9ebef;
  font-variant-numeric: tabular-nums }
th { color: #5b6270; font-weight: 600 }
.warn { border-left: 5px solid #dd6b20 } .warn p { margin: 0 0 6px }
.sample { border-top: 1px solid #e9ebef; padding: 12px 0; display: grid;
  grid-template-columns: auto 1fr; gap: 16px }
.sample .pictures { max-width: 260px } .sample img { display: block; max-width: 160px;
  min-width: 96px; border: 1px solid #ddd; margin-bottom: 4px; image-rendering: pixelated }
.tokens { font: 12px/1.8 ui-monospace, monospace; overflow-wrap: anywhere }
.tokens span { border-radius: 3px; padding: 1px 2px; margin-right: 1px; color: #777;
  background: #f2f2f2 }
.tokens .label { color: #05400a; background: #c9efcd }
.tokens .image { color: #fff; background: #aa3377 }
.why { color: #b4530a; font-weight: 600 } .bad { color: #b00020 } .small { color: #5b6270;
  font-size: 13px }
"""


def make_page(
    survey: Mapping[str, Any],
    strangest: Sequence[tuple[Strange, View]],
    *,
    warnings: Sequence[str],
    changes: Sequence[str] | None,
) -> str:
    """Write the page.

    Args:
        survey: from make_survey.
        strangest: the strangest samples and how the model sees them.
        warnings: lines on what needs attention.
        changes: lines on what differs from an earlier look; None: there was none.
    """
    parts = [_head(survey)]
    if warnings:
        parts.append(_lines("Look at this first", warnings, "warn"))
    if changes is not None:
        told = changes or ["nothing"]
        parts.append(_lines("Changed since the earlier look", told, ""))
    parts.append(f'<div class="columns" style="margin-top:18px">{_charts(survey)}</div>')
    parts += [_truncation(survey), _repeats(survey), _bad(survey)]
    samples = "".join(_sample(strange, view) for strange, view in strangest)
    parts.append(
        f"<section><h2>The {len(strangest)} strangest samples, as the model sees them</h2>"
        '<p class="small">Green: the model is trained to predict it. Images as resized, cropped or '
        f"padded. Orange: in what the sample stands out.</p>{samples}</section>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Data check</title><style>{CSS}</style></head><body><main>"
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def _head(survey: Mapping[str, Any]) -> str:
    looked, total = survey["num_looked_at"], survey["num_samples"]
    scope = (
        f"all {total:,} samples"
        if looked == total
        else (
            f"{looked:,} of {total:,} samples, evenly spread (--max-samples); counts are of these"
        )
    )
    tokens, cut = survey["tokens"], survey["truncation"]
    num_images = sum(survey["image_formats"].values())
    tiles = [
        (f"{total:,}", "samples"),
        (f"{num_images:,}", "images in those looked at"),
        (f"{survey['text_only_share']:.1%}", "samples of text only"),
        (tokens.get("50", 0), f"tokens, median; 99 % below {tokens.get('99', 0)}"),
        (f"{cut['share_of_labels_lost']:.1%}", f"labels lost at seq_length {cut['seq_length']}"),
        (f"{survey['equal_images']['share']:.1%}", "images that are repeats"),
        (f"{sum(survey['bad'].values()):,}", "bad samples"),
    ]
    shown = "".join(
        f'<div class="tile"><b>{value}</b><span>{html.escape(str(words))}</span></div>'
        for value, words in tiles
    )
    name = ", ".join(map(str, survey["folders"]))
    return (
        f"<h1>Data check: {html.escape(name)}</h1>"
        f'<p class="lead">{scope}; template {survey["template"]}, '
        f"{survey['visual_tokens']} tokens for an image, tokenizer "
        f"{html.escape(str(survey['tokenizer']['name']))}</p>"
        f'<section class="tiles">{shown}</section>'
    )


def _lines(title: str, lines: Sequence[str], kind: str) -> str:
    body = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>'


def _charts(survey: Mapping[str, Any]) -> str:
    charts = (
        ("Images of a sample", "images_per_sample"),
        ("Messages of a sample", "turns"),
        ("Script of the letters", "scripts"),
        ("Width over height", "aspects"),
        ("Short side of an image, pixels", "short_sides"),
        ("Format of an image", "image_formats"),
    )
    parts = [_bars(title, survey[name]) for title, name in charts if survey[name]]
    rows = {name: survey[name] for name in ("tokens", "labels", "width", "height") if survey[name]}
    if rows:
        quantiles = list(next(iter(rows.values())))
        head = "".join(f"<th>{q} %</th>" for q in quantiles)
        body = "".join(
            f"<tr><td>{name}</td>" + "".join(f"<td>{row[q]}</td>" for q in quantiles) + "</tr>"
            for name, row in rows.items()
        )
        parts.append(
            '<section style="grid-column: 1 / -1"><h2>Percentiles</h2>'
            f"<table><tr><th></th>{head}</tr>{body}</table></section>"
        )
    return "".join(parts)


def _bars(title: str, counts: Mapping[str, int]) -> str:
    total, largest = sum(counts.values()), max(counts.values())
    rows = "".join(
        f'<div class="row"><span>{html.escape(name)}</span>'
        f'<i style="width:{100 * count / largest:.1f}%"></i>'
        f"<span>{count:,} ({count / total:.1%})</span></div>"
        for name, count in counts.items()
    )
    return f"<section><h2>{title}</h2>{rows}</section>"


def _truncation(survey: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{row['num_samples']}</td><td>{row['num_cut']}</td>"
        f"<td>{row['share_of_labels_lost']:.2%}</td><td>{row['num_without_answer']}</td>"
        f"<td>{row['num_images_split']}</td></tr>"
        for name, row in survey["truncation_by_source"].items()
    )
    return (
        f"<section><h2>Cut off by seq_length {survey['seq_length']}</h2><table><tr><th>source</th>"
        "<th>samples</th><th>cut</th><th>labels lost</th><th>no answer left</th>"
        f'<th>images do not fit</th></tr>{rows}</table><p class="small">seq_length '
        f"{survey['truncation']['proposed_seq_length']} keeps 99 % of the samples whole.</p>"
        "</section>"
    )


def _repeats(survey: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{what}</td><td>{group['count']}</td>"
        f"<td>{html.escape(', '.join(group['samples']))}</td></tr>"
        for what, name in (("image", "equal_images"), ("text", "equal_texts"))
        for group in survey[name]["largest"]
    )
    if not rows:
        return ""
    images, texts = survey["equal_images"], survey["equal_texts"]
    return (
        f"<section><h2>Repeats</h2><p>{images['num_repeats']} images "
        f"({images['share']:.1%}) and {texts['num_repeats']} texts ({texts['share']:.1%}) are "
        "equal to an earlier one; the largest groups:</p><table><tr><th></th><th>times</th>"
        f"<th>samples</th></tr>{rows}</table></section>"
    )


def _bad(survey: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(one['kind']))}</td><td>{html.escape(one['sample'])}</td>"
        f"<td>{html.escape(one['reason'])}</td></tr>"
        for one in survey["bad_examples"]
    )
    if not rows:
        return ""
    kinds = ", ".join(f"{kind}: {count}" for kind, count in survey["bad"].items())
    return (
        f"<section><h2>Bad samples</h2><p>{html.escape(kinds)}</p><table><tr><th>kind</th>"
        f"<th>sample</th><th>reason</th></tr>{rows}</table></section>"
    )


def _sample(strange: Strange, view: View) -> str:
    pictures = "".join(
        f'<img alt="" src="{_jpeg_url(image)}" width="{min(image.width, 160)}">'
        for image in view.images[:4]
    )
    more = f'<p class="small">{len(view.images) - 4} more</p>' if len(view.images) > 4 else ""
    spans = "".join(
        f'<span class="{piece.kind}">{html.escape(piece.text)}</span>'
        + ("<br>" if "\n" in piece.text else "")
        for piece in view.pieces[:TOKENS_SHOWN]
    )
    rest = len(view.pieces) - TOKENS_SHOWN
    fault = f'<p class="bad">{html.escape(view.fault)}</p>' if view.fault else ""
    return (
        f'<div class="sample"><div class="pictures">{pictures}{more}</div><div>'
        f'<div><span class="why">{html.escape("; ".join(strange.reasons))}</span> '
        f'<span class="small">{html.escape(view.sample_id)} (number {view.number}), '
        f"{view.summary}</span></div>{fault}"
        f'<div class="tokens">{spans}{f" ... {rest} more tokens" if rest > 0 else ""}</div>'
        "</div></div>"
    )


def _jpeg_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
