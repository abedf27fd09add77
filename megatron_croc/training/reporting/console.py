"""Lines of metrics on the console: a short one that fits a terminal, or a wide one."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

_NARROW = {
    "text_loss": "text {:.3f}",
    "reconstruction_loss": "recon {:.4f}",
    "grad_norm": "grad {:.3g}",
    "lr": "lr {}",
    "seconds_per_step": "{:.3g} s/step",
    "tokens_per_second": "{} tok/s",
    "mfu": "MFU {:.0%}",
    "labels_cut": "labels cut off {:.1%}",
    "valid_text_loss": "validation: text {:.3f}",
    "valid_reconstruction_loss": "recon {:.4f}",
    "valid_answers_right": "answers right {:.1%}",
}

_WIDE = {
    "loss": "loss {:.4f}",
    "text_loss": "text {:.4f}",
    "reconstruction_loss": "reconstruction {:.5f}",
    "valid_loss": "validation: loss {:.4f}",
    "valid_text_loss": "text {:.4f}",
    "valid_reconstruction_loss": "reconstruction {:.5f}",
    "valid_answers_right": "answers right {:.1%}",
    "labels_cut": "labels cut off {:.1%}",
    "grad_norm": "grad norm {:.3f}",
    "pool_usage": "pool used {:.0%}",
    "matching_share": "matched {:.1%}",
    "hidden_matching_share": "hidden {:.1%}",
    "seconds_per_step": "{:.3g} s/step",
    "samples_per_second": "{:.1f} samples/s",
    "tokens_per_second": "{} tokens/s",
    "packing_fill": "packs filled {:.1%}",
    "imbalance_predicted": "replicas apart {:.1%}",
    "imbalance_seen": "seen {:.1%}",
    "mfu": "MFU {:.1%}",
    "data_wait_share": "waited {:.0%}",
    "lr": "lr {}",
}


def console_lines(
    row: Mapping[str, Any], train_iters: int, *, wide: bool
) -> Iterator[tuple[int, str]]:
    """Format a line of metrics.jsonl for the console.

    Args:
        row: numbers by name, as in metrics.jsonl.
        train_iters: optimizer steps of the whole run.
        wide: most metrics in one long line; otherwise a few, and what is unusual on its own lines.

    Yields:
        logging level and text: `step 20/200  text 3.104  ...  1.2 min left`, then warnings.
    """
    step = f"step {row['iteration']}/{train_iters}"
    shown = dict(row)
    if "tokens_per_second" in row:
        shown["tokens_per_second"] = _short(row["tokens_per_second"])
    rates = {name[3:]: rate for name, rate in row.items() if name.startswith("lr/")}
    if rates:
        shown["lr"] = ", ".join(f"{n} {r:.2e}" for n, r in rates.items()) if wide else _span(rates)
    formats = _WIDE if wide else _NARROW
    parts = [step] + [text.format(shown[name]) for name, text in formats.items() if name in shown]
    parts += [
        f"{name.removeprefix('eval/').replace('/', ' ')} {value:.1%}"
        for name, value in row.items()
        if name.startswith("eval/") and (wide or name.endswith("/accuracy"))
        if not name.endswith("/num_questions")
    ]
    if wide:
        parts += _largest_shares(row)
    if "seconds_per_step" in row and row["iteration"] < train_iters:
        parts.append(_time_left(row["seconds_per_step"] * (train_iters - row["iteration"])))
    yield logging.INFO, (" | " if wide else "  ").join(parts)
    if skipped := row.get("skipped_steps"):
        yield (
            logging.WARNING,
            f"{step}: {skipped} steps since the last line were skipped and changed no weights",
        )


def _short(number: float) -> str:
    """Number with at most four digits and a unit: 940, 5.5k, 212k, 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = number / size
            return f"{digits:.0f}{unit}" if digits >= 100 else f"{digits:.1f}{unit}"
    return f"{number:.0f}"


def _span(rates: Mapping[str, float]) -> str:
    """Learning rate of all parts, or the smallest and the largest."""
    ends = sorted({f"{rate:.1e}".replace("e-0", "e-") for rate in rates.values()}, key=float)
    return ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"


def _largest_shares(row: Mapping[str, Any]) -> list[str]:
    """Largest time shares, such as `forward 31%, backward 52%`; empty if times are not measured."""
    shares = {n[11:]: s for n, s in row.items() if n.startswith("time_share/") and s >= 0.02}
    largest = sorted(shares.items(), key=lambda item: -item[1])[:6]
    return [", ".join(f"{name} {share:.0%}" for name, share in largest)] if largest else []


def _time_left(seconds: float) -> str:
    return f"{seconds / 60:.1f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
