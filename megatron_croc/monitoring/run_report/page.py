"""The report as one HTML file: pictures inside, nothing loaded from anywhere."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_croc.monitoring.run_report.stages import Table

CSS = """
body { margin: 0; background: #f6f7f9; color: #22262e;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 4px; }
h2 { font-size: 21px; margin: 0 0 10px; }
p { max-width: 78ch; margin: 0 0 14px; }
.lead { color: #5b6270; }
section { background: #fff; border: 1px solid #e3e6eb; border-radius: 10px;
          padding: 24px 26px; margin-top: 22px; }
img { max-width: 100%; height: auto; display: block; margin: 10px auto; }
.scroll { overflow-x: auto; margin: 0 0 16px; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid #e9ebef; }
th { color: #5b6270; font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
td:first-child { font-weight: 600; }
code { background: #eef0f3; border-radius: 4px; padding: 1px 5px; font-size: 90%; }
"""


@dataclass(kw_only=True)
class Section:
    """One part of the page: a heading, then paragraphs, tables and pictures in this order."""

    title: str
    paragraphs: Sequence[str | Table] = ()
    """Plain text, where `word` becomes code, and tables between it."""

    tables: Sequence[Table] = ()
    pictures: list[Path] = field(default_factory=list)


def write_page(path: Path, *, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page."""
    body = "\n".join(_section(section) for section in sections)
    path.write_text(
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style></head>\n<body><main>\n<h1>{html.escape(title)}</h1>\n"
        f'<p class="lead">{_text(lead)}</p>\n{body}\n</main></body></html>\n',
        encoding="ascii",
        errors="xmlcharrefreplace",
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [
        f"<p>{_text(part)}</p>" if isinstance(part, str) else _table(part)
        for part in section.paragraphs
    ]
    parts += [_table(table) for table in section.tables]
    parts += [_picture(picture) for picture in section.pictures]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _text(text: str) -> str:
    """Escape; what stands between backquotes becomes code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(pieces))


def _table(table: Table) -> str:
    head, *lines = table
    rows = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for line in lines:
        cells = "".join(f"<td>{html.escape(c).replace('-&gt;', '&rarr;')}</td>" for c in line)
        rows.append(f"<tr>{cells}</tr>")
    return '<div class="scroll"><table>' + "\n".join(rows) + "</table></div>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    name = html.escape(path.stem.replace("_", " "))
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'
