"""Facts about single samples, as training will read them.

sample --read, tokenise, header of each image--> Facts
       --BatchBuilder (decode, cut)------------> its fault, if training cannot use it
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_croc.config.run import RunConfig
from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.batch_builder import BatchBuilder
from megatron_croc.data.order.row_plan import Slot
from megatron_croc.data.sample.collate import measure_extent
from megatron_croc.data.sample.conversation import IMAGE_MARK
from megatron_croc.data.sample.image_header import ImageError, read_header
from megatron_croc.data.sample.tokenization import Tokenizer, tokenize_conversation
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.data.truncation import Extent

AT_ONCE = 16
"""Samples that are decoded in one call."""

LETTERS_READ = 2000
"""Characters of a sample from which its script is told."""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """An encoded image."""

    width: int
    height: int
    format: str
    digest: str
    """Hex sha256 of its bytes, 16 digits."""

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


@dataclass(kw_only=True)
class Facts:
    """One sample."""

    number: int
    """Number in the dataset."""

    sample_id: str
    source: str
    """Name of the dataset folder."""

    num_images: int = 0
    images: list[ImageFacts] = field(default_factory=list)
    """Images whose header can be read."""

    extent: Extent | None = None
    """Length and labels; None if the text cannot be tokenised."""

    num_turns: int = 0
    """Messages."""

    characters: int = 0
    """Characters of all messages, without image marks."""

    text_digest: str = ""
    """Hex sha256 of all messages, 16 digits; empty without text."""

    scripts: Counter[str] = field(default_factory=Counter)
    """Letters by Unicode script."""

    symbols: int = 0
    """Characters that are neither letters, digits, marks nor spaces."""

    fault: BadSampleError | None = None
    """Fault for which training puts a placeholder in its place."""

    @property
    def script(self) -> str:
        """Most frequent script; "none" without letters."""
        return self.scripts.most_common(1)[0][0] if self.scripts else "none"


def collect(
    run: RunConfig,
    dataset: ShardedDataset,
    builder: BatchBuilder,
    tokenizer: Tokenizer,
    numbers: Sequence[int],
) -> Iterator[Facts]:
    """Yield the facts of some samples of a run's data_path, which `dataset` and `builder` read.

    Raises:
        DataError: a shard is damaged, or the data does not fit the run.
    """
    for begin in range(0, len(numbers), AT_ONCE):
        some = numbers[begin : begin + AT_ONCE]
        _, bad = builder.build([Slot(epoch=0, index=number) for number in some])
        faults = {error.sample_id: error for error in bad}
        for number in some:
            facts = _facts_of(run, dataset, tokenizer, number)
            facts.fault = faults.get(facts.sample_id, facts.fault)
            yield facts


def _facts_of(run: RunConfig, dataset: ShardedDataset, tokenizer: Tokenizer, number: int) -> Facts:
    try:
        raw = dataset.read(number)
    except BadSampleError as error:
        name = error.sample_id
        return Facts(number=number, sample_id=name, source=name.rpartition("/")[0], fault=error)
    facts = Facts(
        number=number,
        sample_id=raw.sample_id,
        source=raw.sample_id.rpartition("/")[0],
        num_images=len(raw.image_bytes),
    )
    for data in raw.image_bytes:
        try:
            header = read_header(data)
        except ImageError:
            continue
        facts.images.append(
            ImageFacts(
                width=header.width,
                height=header.height,
                format=header.format,
                digest=hashlib.sha256(data).hexdigest()[:16],
            )
        )
    _read_text(facts, raw.conversations)
    try:
        sample = tokenize_conversation(
            tokenizer,
            run.data.conversation_template,
            raw.conversations,
            num_images=len(raw.image_bytes),
            sample_id=raw.sample_id,
        )
    except BadSampleError as error:
        facts.fault = error
        return facts
    num_visual_tokens = run.model.vision_tower.num_visual_tokens
    facts.extent = measure_extent(sample, num_visual_tokens=num_visual_tokens)
    return facts


def _read_text(facts: Facts, conversations: object) -> None:
    messages = conversations if isinstance(conversations, list) else []
    texts = [
        value.replace(IMAGE_MARK, "").strip()
        for message in messages
        if isinstance(message, dict) and isinstance(value := message.get("value"), str)
    ]
    text = "\n".join(texts)
    facts.num_turns = len(texts)
    facts.characters = len(text)
    if text.strip():
        facts.text_digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    for character in text[:LETTERS_READ]:
        kind = _kind_of(character)
        if kind == "symbol":
            facts.symbols += 1
        elif kind:
            facts.scripts[kind] += 1


@lru_cache(maxsize=1 << 16)
def _kind_of(character: str) -> str:
    """Return the script of a letter, "symbol", or nothing for digits, marks and spaces."""
    category = unicodedata.category(character)
    if category[0] in "NMZ" or character in "\n\t\r":
        return ""
    if category[0] != "L":
        return "symbol"
    word = unicodedata.name(character, "UNKNOWN").split()[0]
    return {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}.get(word, word.capitalize())
