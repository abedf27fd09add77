"""A small SentencePiece tokenizer with LLaMA's settings, trained from texts.

For trials and for language models trained from random weights. A pretrained language model needs
the tokenizer that it was trained with.
"""

import io
import itertools
from collections.abc import Iterable, Iterator

from megatron_croc.data.sample.conversation import VICUNA_SYSTEM
from megatron_croc.errors import DataError, first_line

PROMPT = f"{VICUNA_SYSTEM} USER: ASSISTANT:"
"""Text that the template `v1` adds to a sample. Training texts hold it as often as a caption, so
that it is cut into words and does not fill the sequence with letters."""

NUM_SPECIAL = 3
"""Pieces for unknown (0), begin (1) and end (2)."""

NUM_BYTES = 256
"""Pieces for single bytes, which spell characters that are not in the training texts."""

MAX_LINE = 1000
"""Characters of one training text; SentencePiece leaves out texts above 4192 bytes."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE model with bytes for unknown characters.

    Args:
        texts: training texts; each line is one training sentence.
        vocab_size: largest number of ids; the model has fewer if the texts do not provide as many.

    Returns:
        The content of a `tokenizer.model` file; the same texts give the same bytes.

    Raises:
        DataError: no text, or more different characters than `vocab_size` leaves room for.
    """
    import sentencepiece

    lines = _lines(texts)
    first = next(lines, None)
    if first is None:
        raise DataError("no text to train a tokenizer from")
    characters: set[str] = set()
    model = io.BytesIO()
    try:
        # An iterator and a buffer: a model trained from files remembers their paths.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_count(itertools.chain([first], lines), characters),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = NUM_SPECIAL + NUM_BYTES + len(characters)
        if vocab_size < needed:
            raise DataError(
                f"vocab_size {vocab_size} is too small: {NUM_SPECIAL} special pieces, {NUM_BYTES} "
                f"bytes and the {len(characters)} characters of these texts need at least {needed}"
            ) from error
        raise DataError(f"SentencePiece cannot be trained: {first_line(error)}") from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield lines that are not blank, in pieces of at most MAX_LINE characters."""
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), MAX_LINE):
                if (piece := line[begin : begin + MAX_LINE]).strip():
                    yield piece


def _count(lines: Iterable[str], characters: set[str]) -> Iterator[str]:
    """Yield the lines and collect their characters, spaces as SentencePiece writes them."""
    for line in lines:
        characters.update(line.replace(" ", "\u2581"), "\u2581")
        yield line
