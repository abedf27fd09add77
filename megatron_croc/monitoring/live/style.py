"""Style of the page: colours for light and dark."""

REGION_COLOURS = {
    "forward": "#2f9e6e",
    "backward": "#1f6f4d",
    "vision": "#3b82c4",
    "reconstruction": "#56b4c9",
    "matching": "#dd6b20",
    "optimizer": "#7a5aa8",
    "pipeline_wait": "#d1477f",
    "sync": "#e0b13a",
    "data_wait": "#c0392b",
    "validation": "#8da0b8",
    "checkpoint": "#8b6b4e",
    "other": "#b9bfca",
}
"""Region of the time split -> colour; work first, then waiting, then pauses, from the bottom up."""

_LINES = (
    "#2f6db5",
    "#dd6b20",
    "#2f9e6e",
    "#7a5aa8",
    "#c0392b",
    "#12899b",
    "#8a6d1c",
    "#8a909c",
)

CSS = (
    """
:root { --page: #f6f7f9; --card: #fff; --ink: #22262e; --soft: #5b6270; --rule: #e3e6eb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171b; --card: #1e2127; --ink: #e6e8ec; --soft: #9aa1ad; --rule: #333842; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 22px 60px; }
h1 { font-size: 26px; margin: 0 0 6px; }
h2 { font-size: 17px; margin: 0 0 8px; }
h3 { font-size: 14px; margin: 14px 0 6px; color: var(--soft); }
a { color: #2f6db5; }
i { font-style: normal; color: var(--soft); }
.tiles, .card, figure { background: var(--card); border: 1px solid var(--rule);
                        border-radius: 10px; margin: 16px 0 0; padding: 16px 18px; }
.tiles > div { display: grid; gap: 14px;
               grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile span, .tile i { display: block; font-size: 12.5px; color: var(--soft); }
.tile b { font-size: 23px; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.grid-of-charts { display: grid; gap: 16px; margin-top: 16px;
                  grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); }
figure { margin: 0; }
figcaption i { font-size: 12.5px; margin-left: 4px; }
.legend { margin: 4px 0 0; font-size: 12.5px; color: var(--soft); }
.legend span { margin-right: 14px; white-space: nowrap; }
.key { width: 14px; height: 10px; margin-right: 5px; }
figure > svg { width: 100%; height: auto; display: block; margin-top: 8px; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .y { text-anchor: end; }
svg .x { text-anchor: middle; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dot { stroke: var(--card); stroke-width: 1.5; }
svg .near { fill: transparent; }
svg .bar { fill: #2f6db5; }
svg .slow { fill: #c0392b; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { text-align: left; padding: 5px 22px 5px 0; border-bottom: 1px solid var(--rule);
         font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
"""
    + "\n".join(
        f"svg .line.c{k} {{ stroke: {colour}; }} svg .dot.c{k} {{ fill: {colour}; }}"
        for k, colour in enumerate(_LINES)
    )
    + "\n"
    + "\n".join(f"svg .r-{name} {{ fill: {colour}; }}" for name, colour in REGION_COLOURS.items())
    + "\n"
)
"""The page's style sheet."""
