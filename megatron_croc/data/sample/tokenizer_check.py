"""Comparison of a tokenizer's ids with those of transformers for the same folder.

    built-in texts, conversations --Tokenizer-----> ids --+--> equal, or one line that says where
                                  --transformers--> ids --+

The weights of a model belong to the ids of the program that they were trained with, so a difference
is told before anything is trained or measured.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_croc.config.data import TemplateName
from megatron_croc.data.sample.conversation import (
    BOS,
    Special,
    parts_as_text,
    render_conversation,
)
from megatron_croc.data.sample.tokenization import Tokenizer, tokenize_conversation
from megatron_croc.errors import first_line
from megatron_croc.log import get_logger, log_once, rank

_WORDS = (
    "a", "car", "The quick brown fox", "don't", "e.g.", "USER", "ASSISTANT:", "3.14", "1234567890",
    "10,000 km", "50%", "$5", "#1", "x=y+1", "a/b", "C:\\path", "user@example.org", "(a)", "[1, 2]",
    "{}", "<p>", "<image", "a_b-c", "...", "?!", "\u2013 \u2014", "\u201cquoted\u201d", "caf\u00e9",
    "cafe\u0301", "na\u00efve", "\u00df", "\u0130", "\ufb01ne", "\u00bd", "x\u00b2", "\u4e2d\u6587",
    "\u65e5\u672c\u8a9e\u3067\u3059", "\ud55c\uad6d\uc5b4", "\u0440\u0443\u0441", "\u03b1\u03b2",
    "\u0639\u0631\u0628", "\u05e2\u05d1", "\u0939\u093f\u0902", "\u0e44\u0e17\u0e22", "\U0001f600",
    "\U0001f468\u200d\U0001f469", "\u00a0", "\u3000", "\u200b", "def f(x):\n    return x",
)  # fmt: skip
_FORMS = ("{}", " {}", "{} ", "  {}  ", "\n{}", "{0}  {0}", "{0}\n\n{0}", "\t{}")
_ROUNDS = (
    (("What is it?", "A red car."),),
    (("Hi", "Hello"), ("And 2 + 2?", "4"), ("Thanks.\n", " \u4e2d")),
    (("Two  spaces ", "\n- a\n- b"), ("\tTab", "\u00e9t\u00e9 \U0001f600")),
)

logger = get_logger(__name__)


def announce_tokenizer(tokenizer: Tokenizer, template: TemplateName) -> None:
    """Log the tokenizer and its legacy flag once, and warn if transformers gives other ids."""
    if rank() != 0:
        return
    flag = f", legacy={tokenizer.legacy} ({tokenizer.legacy_reason})"
    log_once(
        logger,
        logging.INFO,
        "tokenizer %s: %d ids%s",
        tokenizer.name,
        tokenizer.size,
        flag if tokenizer.adds_prefix else "",
    )
    if (difference := compare_with_transformers(tokenizer, template)) is not None:
        log_once(logger, logging.WARNING, "%s", difference)


def compare_with_transformers(tokenizer: Tokenizer, template: TemplateName) -> str | None:
    """Compare the ids of a few hundred texts and some conversations.

    Args:
        tokenizer: the tokenizer of a run.
        template: template of the conversations.

    Returns:
        One line with the first difference and the way out; None if there is none, or transformers
        is not installed or cannot read the folder.
    """
    path = Path(tokenizer.name)
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        import transformers

        theirs = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except ImportError:
        return None
    except Exception as error:  # whatever a version of transformers makes of the folder
        logger.info("tokenizer %s is not compared: %s", folder, first_line(error))
        return None
    compared = list(_texts(tokenizer, theirs, template))
    different = [(text, a, b) for text, a, b in compared if a != b]
    if not different:
        return None
    text, own, other = different[0]
    eos = str(theirs.eos_token)
    place = next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), 0)
    if tokenizer.adds_prefix and all(eos in text for text, _, _ in different):
        cause = f"behind special tokens only: legacy={tokenizer.legacy} here"
        remedy = f'"legacy": {str(not tokenizer.legacy).lower()} or {str(tokenizer.legacy).lower()}'
        remedy = f"set {remedy} in {folder / 'tokenizer_config.json'}, as its weights were trained"
    else:
        cause, remedy = "in ordinary text", "use the tokenizer that its weights were trained with"
    begin = max(place - 1, 0)
    return (
        f"tokenizer {tokenizer.name}: {len(different)} of {len(compared)} texts get other ids than "
        f"from transformers {transformers.__version__}, {cause} ({text[:60]!r}: from id "
        f"{begin} on {own[begin : begin + 4]}, there {other[begin : begin + 4]}); {remedy}"
    )


def _texts(
    tokenizer: Tokenizer, theirs: Any, template: TemplateName
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield texts with the ids of both."""

    def ids_of(text: str) -> list[int]:
        return list(theirs(text, add_special_tokens=False).input_ids)

    for form in _FORMS:
        # Before a text that begins with a space, SentencePiece puts another one; the tokenizers of
        # transformers 5 put none. The released code used SentencePiece.
        if tokenizer.adds_prefix and form.startswith(" "):
            continue
        for word in _WORDS:
            text = form.format(word) if "{0}" not in form else form.replace("{0}", word)
            yield text, tokenizer.encode(text), ids_of(text)
    for rounds in _ROUNDS:
        messages = []
        for question, answer in rounds[:1] if template == "plain" else rounds:
            messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        parts = render_conversation(template, messages, num_images=0, sample_id="check")
        sample = tokenize_conversation(
            tokenizer, template, messages, num_images=0, sample_id="check"
        )
        begins = parts[0] == Special(BOS)  # transformers puts it before the text by itself
        text = parts_as_text(parts, bos="", eos=str(theirs.eos_token))
        yield text, sample.input_ids.tolist()[begins:], ids_of(text)
