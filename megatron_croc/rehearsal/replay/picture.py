"""The step as an SVG picture: a row of kernels and one of communication for each pipeline stage.

forward, backward    kernels of a micro-batch, with its number; later model chunks are darker
other                kernels outside micro-batches: gradients, optimizer
traffic              communication that moves data; thin where it waits for another rank
memory               bytes in use, as a line under the rows, if the traces have them
"""

from collections.abc import Iterator, Sequence
from html import escape

from megatron_croc.rehearsal.replay.timeline import RankTime, Slice, Timeline

WIDTH, LEFT, ROW, LANE, GAP = 1100, 110, 26, 10, 12
MEMORY_HEIGHT = 28
COLORS = {
    "forward": ("#4c86c6", "#2f5f97"),
    "backward": ("#e08a3c", "#a85f1e"),
    "": ("#7a7a7a", "#7a7a7a"),
}
TRAFFIC, WAITING, MEMORY = "#3a9a5c", "#c9d8cf", "#8a4fa3"
MOST_STAGES, MOST_REPLICAS = 16, 6
"""Most ranks that are drawn."""

LEAST_PIXELS = 0.4
"""Kernels closer than this many pixels are drawn as one; communication from twice that on."""


def draw_timeline(timeline: Timeline, *, title: str = "") -> str:
    """An SVG picture of the ranks that matter."""
    ranks = _drawn(timeline)
    by_rank: dict[int, list[Slice]] = {rank.rank: [] for rank in ranks}
    for piece in timeline.slices:
        if piece.rank in by_rank:
            by_rank[piece.rank].append(piece)
    has_memory = bool(timeline.memory)
    has_stages = len({rank.coordinates["pp"] for rank in timeline.ranks}) > 1
    each = ROW + LANE + GAP + (MEMORY_HEIGHT if has_memory else 0)
    height = 52 + each * len(ranks) + 44
    scale = (WIDTH - LEFT - 12) / (timeline.seconds or 1.0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{escape(title or 'Predicted timeline of a step')}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="18" font-size="13">{escape(_headline(timeline, title))}</text>',
        *_legend(),
    ]
    for number, rank in enumerate(ranks):
        top = 52 + number * each
        lines += _row(rank, by_rank[rank.rank], top, scale, has_stages=has_stages)
        if has_memory:
            lines += _memory(timeline, rank, top + ROW + LANE + 4, scale)
    lines += _axis(timeline.seconds, height - 34, scale)
    lines.append("</svg>\n")
    return "\n".join(lines)


def _drawn(timeline: Timeline) -> list[RankTime]:
    """A rank of each stage in the slowest replica; with one stage, of slow and fast replicas."""
    first = [r for r in timeline.ranks if not r.coordinates["tp"] + r.coordinates["cp"]]
    replica, _ = timeline.longest_over_mean("dp")
    ranks = [rank for rank in first if rank.coordinates["dp"] == replica]
    if len(ranks) == 1:
        ranks = sorted(first, key=lambda rank: -rank.compute)
        last = max(1, min(MOST_REPLICAS, len(ranks)) - 1)
        places = {round(n * (len(ranks) - 1) / last) for n in range(last + 1)}
        return [ranks[place] for place in sorted(places)]
    return sorted(ranks, key=lambda rank: rank.rank)[:MOST_STAGES]


def _headline(timeline: Timeline, title: str) -> str:
    parts = [f"{title}: " if title else "", f"{timeline.seconds:.4g} s a step"]
    if timeline.seconds:
        parts.append(f", bubble {timeline.bubble / timeline.seconds:.1%}")
        exposed = sum(timeline.exposed.values()) / timeline.seconds
        parts.append(f", exposed communication {exposed:.1%}")
    return "".join(parts)


def _legend() -> Iterator[str]:
    entries = [
        ("forward", COLORS["forward"][0]),
        ("backward", COLORS["backward"][0]),
        ("other kernels", COLORS[""][0]),
        ("traffic", TRAFFIC),
        ("waits for a rank", WAITING),
        ("memory", MEMORY),
    ]
    x = LEFT
    for name, color in entries:
        yield f'<rect x="{x}" y="30" width="10" height="10" fill="{color}"/>'
        yield f'<text x="{x + 14}" y="39">{name}</text>'
        x += 28 + 7 * len(name)


def _row(
    rank: RankTime, slices: Sequence[Slice], top: int, scale: float, *, has_stages: bool
) -> Iterator[str]:
    name = f"stage {rank.coordinates['pp']}" if has_stages else f"replica {rank.coordinates['dp']}"
    name += f", rank {rank.rank}"
    yield f'<text x="8" y="{top + 17}">{name}</text>'
    yield f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - 12}" height="{ROW}" fill="#f2f2f2"/>'
    for begin, end, direction, micro_batch, chunk in _merged(slices, scale):
        color = COLORS[direction][min(chunk, 1)]
        x, width = LEFT + begin * scale, max((end - begin) * scale, LEAST_PIXELS)
        yield (
            f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" fill="{color}" '
            'stroke="white" stroke-width="0.4"/>'
        )
        if micro_batch is not None and width > 14:
            yield (
                f'<text x="{x + width / 2:.1f}" y="{top + 17}" text-anchor="middle" fill="white">'
                f"{micro_batch}</text>"
            )
    lane = top + ROW + 2
    for color, height, intervals in (
        (WAITING, LANE // 2, [(s.ready, s.begin) for s in slices if not s.is_compute]),
        (TRAFFIC, LANE, [(s.begin, s.end) for s in slices if not s.is_compute]),
    ):
        for begin, end in _joined(intervals, scale):
            width = max((end - begin) * scale, LEAST_PIXELS)
            yield (
                f'<rect x="{LEFT + begin * scale:.1f}" y="{lane}" width="{width:.1f}" '
                f'height="{height}" fill="{color}"/>'
            )


_Drawn = tuple[float, float, str, int | None, int]


def _merged(slices: Sequence[Slice], scale: float) -> list[_Drawn]:
    """Kernels, those of one micro-batch, direction and chunk in a row as one."""
    found: list[_Drawn] = []
    for piece in sorted((s for s in slices if s.is_compute), key=lambda s: s.begin):
        label = piece.label
        kind = label.direction, label.micro_batch, label.chunk
        if found and found[-1][2:] == kind and (piece.begin - found[-1][1]) * scale < LEAST_PIXELS:
            found[-1] = found[-1][0], max(found[-1][1], piece.end), *kind
        else:
            found.append((piece.begin, piece.end, *kind))
    return found


def _joined(intervals: Sequence[tuple[float, float]], scale: float) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if end <= begin:
            continue
        if joined and (begin - joined[-1][1]) * scale < 2 * LEAST_PIXELS:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def _memory(timeline: Timeline, rank: RankTime, top: int, scale: float) -> Iterator[str]:
    samples = sorted((s for s in timeline.memory if s.rank == rank.rank), key=lambda s: s.time)
    most = max((max(s.allocated, s.peak) for s in timeline.memory), default=0)
    if not samples or not most:
        return
    points: list[str] = []
    last = (-1.0, -1.0)
    for sample in samples:
        x = LEFT + sample.time * scale
        y = top + MEMORY_HEIGHT * (1 - max(sample.allocated, sample.peak) / most)
        if x - last[0] >= 0.5 or abs(y - last[1]) >= 0.5:
            points.append(f"{x:.1f},{y:.1f}")
            last = x, y
    path = " ".join(points)
    yield f'<polyline points="{path}" fill="none" stroke="{MEMORY}" stroke-width="1"/>'
    peak = max(max(s.allocated, s.peak) for s in samples) / 2**30
    yield f'<text x="8" y="{top + MEMORY_HEIGHT - 6}" fill="{MEMORY}">{peak:.3g} GiB</text>'


def _axis(seconds: float, y: int, scale: float) -> Iterator[str]:
    yield f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - 12}" y2="{y}" stroke="#444"/>'
    for number in range(6):
        time = seconds * number / 5
        x = LEFT + time * scale
        yield f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 4}" stroke="#444"/>'
        yield f'<text x="{x:.1f}" y="{y + 16}" text-anchor="middle">{time:.3g} s</text>'
