"""A whole look: samples chosen, facts collected, survey and page written.

samples --facts.py--> Facts --survey.py--> check.json --compare.py--> what has changed
                        |                      |
                        +--strange.py----------+--page.py--> check.html
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically
from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch_builder import build_batch_builder
from megatron_croc.data.look.compare import compare_surveys, read_survey
from megatron_croc.data.look.facts import collect
from megatron_croc.data.look.page import make_page
from megatron_croc.data.look.strange import choose_strangest
from megatron_croc.data.look.survey import choose_samples, make_survey
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.sample.tokenizer_check import announce_tokenizer
from megatron_croc.data.sample_view import view_sample
from megatron_croc.data.store.manifest import content_digest, read_manifest
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError

PAGE, SURVEY = "check.html", "check.json"

REPEATS_TOLD = 0.01
"""Share of repeated images or texts from which a warning is given."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Result of a look."""

    survey: dict[str, Any]
    """Content of check.json."""

    warnings: list[str]
    """Lines on what needs attention."""

    changes: list[str] | None
    """Lines on what differs from the earlier look; None: none was given."""

    page: Path
    """Path of check.html."""


def look_at(
    run: RunConfig,
    out: Path,
    *,
    max_samples: int,
    num_strangest: int,
    compare: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> Look:
    """Look at the data_path of a run, and write check.json and check.html.

    Args:
        run: the run that is to train on it.
        out: folder to write; created if missing.
        max_samples: samples looked at, evenly spread; 0: all.
        num_strangest: samples shown.
        compare: check.json of an earlier look.
        progress: called with the number of samples since the previous call.

    Raises:
        DataError: the data cannot be opened or is empty, or `compare` cannot be read.
    """
    before = None if compare is None else read_survey(compare)
    data = run.data
    manifests = [read_manifest(folder) for folder in data.data_path]
    dataset = ShardedDataset(data.data_path, roots=data.data_roots)
    if not len(dataset):
        raise DataError(f"{', '.join(data.data_path)}: no samples there")
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    announce_tokenizer(tokenizer, data.conversation_template)
    builder = build_batch_builder(run, data.data_path, pad_to_multiple_of=1)
    numbers = choose_samples(len(dataset), max_samples)
    found = []
    for facts in collect(run, dataset, builder, tokenizer, numbers):
        found.append(facts)
        progress(1)
    survey = make_survey(
        run, tokenizer, found, num_samples=len(dataset), digest=content_digest(manifests)
    )
    strangest = choose_strangest(found, num_strangest)
    survey["strangest"] = [
        {"sample": s.facts.sample_id, "number": s.facts.number, "reasons": s.reasons}
        for s in strangest
    ]
    warnings = find_warnings(survey, max_bad_fraction=data.max_bad_fraction)
    changes = None if before is None else compare_surveys(before, survey)
    shown = [(s, view_sample(builder, tokenizer, s.facts.number)) for s in strangest]
    page = make_page(survey, shown, warnings=warnings, changes=changes)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / SURVEY, (json.dumps(survey, indent=1) + "\n").encode())
    write_atomically(out / PAGE, page.encode("ascii", "xmlcharrefreplace"))
    return Look(survey=survey, warnings=warnings, changes=changes, page=out / PAGE)


def find_warnings(survey: dict[str, Any], *, max_bad_fraction: float) -> list[str]:
    """Say what needs attention before training, a line each."""
    lines = []
    looked, cut = survey["num_looked_at"], survey["truncation"]
    num_bad = sum(survey["bad"].values())
    if num_bad:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in survey["bad"].items())
        limit = (
            f"; training stops above max_bad_fraction = {max_bad_fraction}"
            if num_bad > max_bad_fraction * looked
            else ""
        )
        lines.append(f"{num_bad} of {looked} samples are bad ({kinds}){limit}")
    if cut["num_cut"]:
        lines.append(
            f"{cut['num_cut']} samples are longer than seq_length = {cut['seq_length']}, "
            f"{cut['share_of_labels_lost']:.1%} of the labels are lost; --seq-length "
            f"{cut['proposed_seq_length']} keeps 99% of the samples whole"
        )
    for name, words in (("equal_images", "images"), ("equal_texts", "texts")):
        if survey[name]["share"] >= REPEATS_TOLD:
            lines.append(
                f"{survey[name]['num_repeats']} {words} ({survey[name]['share']:.1%}) are equal to "
                "an earlier one"
            )
    if survey["images_per_sample"] and set(survey["images_per_sample"]) == {"0"}:
        lines.append("no sample has an image")
    return lines
