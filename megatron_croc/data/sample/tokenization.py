"""Tokenizers, and conversion of conversations to token ids with labels.

    messages --conversation.py--> parts --Tokenizer--> input_ids, labels (unshifted)
                                  Image ------------> IMAGE_TOKEN_INDEX, one per image

LLaMA tokenizers put a space before a text ("dummy prefix"). With Hugging Face's `legacy` flag they
also do so after a special token: "</s>USER" is [.., "_US", "ER"] with legacy and [.., "USER"]
without. The released code uses both; legacy.py decides it from the files of a checkpoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_croc.config.data import TemplateName, TokenizerType
from megatron_croc.data.sample.conversation import (
    BOS,
    EOS,
    IM_END,
    TEMPLATES,
    Image,
    Part,
    Special,
    Text,
    render_conversation,
    render_prompt,
)
from megatron_croc.data.sample.legacy import Legacy, decide_legacy
from megatron_croc.errors import DataError, first_line
from megatron_croc.ops.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX

Follows = Literal["start", "special", "text"]
"""Predecessor of a text: nothing (or an image), a special token, or more text."""

_ANCHOR = "\n"
"""Text put before another to receive its dummy prefix; no LLaMA piece spans a line break."""


@dataclass(frozen=True, kw_only=True)
class TokenizedSample:
    """Token ids and labels of one sample."""

    sample_id: str
    """Name of the sample."""

    input_ids: np.ndarray
    """int64 [L], IMAGE_TOKEN_INDEX once per image (expand_sample: once per visual token)."""

    labels: np.ndarray
    """int64 [L], unshifted: the token itself if it is supervised, else IGNORE_INDEX."""

    answer: int = 0
    """Place of the first token of the first answer in `input_ids`; 0: not known."""


class Tokenizer:
    """Converts text to ids and back, for every tokenizer library. Safe to share between threads."""

    def __init__(
        self,
        *,
        name: str,
        size: int,
        special_ids: dict[str, int],
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        adds_prefix: bool,
        legacy: bool,
        legacy_reason: str = "",
    ) -> None:
        """Wrap a tokenizer library.

        Args:
            name: file or folder, for messages.
            size: number of ids; they are 0 .. size - 1.
            special_ids: BOS, EOS and other special tokens by name.
            encode: text -> ids; does not recognise special tokens in the text.
            decode: ids -> text, without special tokens.
            adds_prefix: True if `encode` puts a space before the text.
            legacy: True if it also does so after a special token.
            legacy_reason: source of `legacy`, for messages.
        """
        self.name = name
        self.size = size
        self.special_ids = special_ids
        self.adds_prefix = adds_prefix
        self.legacy = legacy
        self.legacy_reason = legacy_reason
        self._encode = encode
        self._decode = decode
        self._anchor_ids = encode(_ANCHOR)

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends an answer."""
        return self.special_ids.get(EOS)

    def encode(self, text: str, *, follows: Follows = "start") -> list[int]:
        """Encode a text, given its predecessor.

        Raises:
            DataError: the tokenizer merges a line break with the text after it, so a text cannot
                be encoded without its prefix.
        """
        wants_prefix = follows == "start" or (follows == "special" and self.legacy)
        if wants_prefix or not self.adds_prefix:
            return self._encode(text)
        anchored = self._encode(_ANCHOR + text)
        if anchored[: len(self._anchor_ids)] != self._anchor_ids:
            raise DataError(
                f"tokenizer {self.name}: a line break merges with {text[:20]!r}; "
                "it cannot continue a text without adding a space"
            )
        return anchored[len(self._anchor_ids) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, without special tokens and image marks."""
        return self._decode([int(i) for i in ids if i >= 0])


def build_tokenizer(
    tokenizer_type: TokenizerType,
    tokenizer_model: str | None,
    *,
    legacy: bool | None = None,
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        tokenizer_type: SentencePieceTokenizer reads a .model file, HuggingFaceTokenizer a folder.
        tokenizer_model: path of the tokenizer.
        legacy: overrides the flag that the files beside it say (legacy.py).

    Raises:
        DataError: no such path, or not a tokenizer of that type.
    """
    if tokenizer_model is None:
        raise DataError("tokenizer_model is not set: give the path of a .model file or a folder")
    path = Path(tokenizer_model)
    if not path.exists():
        raise DataError(f"tokenizer_model {path} does not exist")
    build = _build_sentencepiece if tokenizer_type == "SentencePieceTokenizer" else _build_hf
    folder = path if path.is_dir() else path.parent
    return build(path, decide_legacy(folder) if legacy is None else Legacy(legacy, "as asked"))


def _build_sentencepiece(path: Path, legacy: Legacy) -> Tokenizer:
    import sentencepiece

    if path.is_dir():
        raise DataError(
            f"tokenizer_model {path} is a folder; SentencePieceTokenizer reads a .model file "
            f"(try {path / 'tokenizer.model'}, or HuggingFaceTokenizer)"
        )
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        special_ids = {
            model.id_to_piece(i): i for i in range(model.get_piece_size()) if model.is_control(i)
        }
        named = ((BOS, model.bos_id()), (EOS, model.eos_id()))
        special_ids |= {name: i for name, i in named if i >= 0}
        return Tokenizer(
            name=str(path),
            size=model.get_piece_size(),
            special_ids=special_ids,
            encode=model.encode,
            decode=model.decode,
            adds_prefix=model.encode("a", out_type=str)[0].startswith("\u2581"),
            legacy=legacy.value,
            legacy_reason=legacy.reason,
        )
    except Exception as error:  # a damaged model raises almost anything
        raise DataError(
            f"tokenizer_model {path} is not a SentencePiece model: {first_line(error)}; get the "
            "file again"
        ) from error


def _build_hf(path: Path, legacy: Legacy) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        wrapper = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        # The backend object: the transformers wrapper changes its state at every call.
        backend: Any = wrapper.backend_tokenizer
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        added = backend.get_added_tokens_decoder()
        special_ids = {token.content: i for i, token in added.items() if token.special}
        named = ((BOS, wrapper.bos_token_id), (EOS, wrapper.eos_token_id))
        special_ids |= {name: i for name, i in named if i is not None}
        first = backend.encode("a", add_special_tokens=False).tokens[:1]
        return Tokenizer(
            name=str(path),
            size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            special_ids=special_ids,
            encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
            decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
            adds_prefix=bool(first) and first[0].startswith("\u2581"),
            legacy=legacy.value,
            legacy_reason=legacy.reason,
        )
    except Exception as error:  # a damaged folder raises almost anything
        raise DataError(
            f"tokenizer_model {path} is not a Hugging Face tokenizer folder with a "
            f"tokenizer.json: {first_line(error)}"
        ) from error


def check_tokenizer(tokenizer: Tokenizer, template: TemplateName, vocab_size: int) -> None:
    """Refuse a tokenizer that does not fit the template or the model.

    Raises:
        DataError: it has more ids than the model has embeddings, or lacks a token of the template.
    """
    if tokenizer.size > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.size} ids, the model's vocab_size is "
            f"{vocab_size}: set vocab_size to at least {tokenizer.size}"
        )
    needed = TEMPLATES[template]
    missing = [name for name in needed.specials if name not in tokenizer.special_ids]
    if missing:
        raise DataError(
            f"tokenizer {tokenizer.name} lacks the special token(s) {', '.join(missing)} that "
            f"conversation_template {template} needs: choose the template it was made for"
        )
    for text in needed.supervised_tokens:
        if len(tokenizer.encode(text, follows="text")) != 1:
            raise DataError(
                f"tokenizer {tokenizer.name} has no single token for {text!r}, which "
                f"conversation_template {template} needs"
            )


def tokenize_conversation(
    tokenizer: Tokenizer,
    template: TemplateName,
    messages: object,
    *,
    num_images: int,
    sample_id: str,
) -> TokenizedSample:
    """Convert messages to ids and unshifted labels.

    Raises:
        BadSampleError: the conversation cannot be trained on.
    """
    parts = render_conversation(template, messages, num_images=num_images, sample_id=sample_id)
    return _tokenize_parts(tokenizer, template, parts, sample_id)


def tokenize_prompt(
    tokenizer: Tokenizer,
    template: TemplateName,
    question: str,
    *,
    history: Sequence[tuple[str, str]] = (),
) -> np.ndarray:
    """Encode the prompt of a reply to `question`, int64 [L], IMAGE_TOKEN_INDEX once per image.

    They are the first L ids of a training sample with the same history, question and any answer.
    """
    parts = render_prompt(template, question, history=history)
    return _tokenize_parts(tokenizer, template, parts, "prompt").input_ids


def stop_ids(tokenizer: Tokenizer, template: TemplateName) -> tuple[int, ...]:
    """Return the ids that end an answer: the template's and the tokenizer's end token.

    Raises:
        DataError: the tokenizer has none of them.
    """
    found = [tokenizer.special_ids[n] for n in (IM_END, EOS) if n in tokenizer.special_ids]
    if template == "plain" and len(line_end := tokenizer.encode("\n", follows="text")) == 1:
        found += line_end
    if not found:
        raise DataError(f"tokenizer {tokenizer.name} has no token that ends an answer")
    return tuple(dict.fromkeys(found))


def _tokenize_parts(
    tokenizer: Tokenizer, template: TemplateName, parts: Sequence[Part], sample_id: str
) -> TokenizedSample:
    ids: list[int] = []
    supervised: list[bool] = []
    answer = 0
    follows: Follows = "start"
    for part in parts:
        match part:
            case Image():
                new, label, follows_next = [IMAGE_TOKEN_INDEX], False, "start"
            case Special(name, label):
                new = [tokenizer.special_ids[name]]
                follows_next = "start" if name == BOS else "special"
            case Text(text, label, role):
                new, follows_next = tokenizer.encode(text, follows=follows), "text"
                if label and not answer:
                    answer = len(ids) + len(tokenizer.encode(role, follows=follows) if role else ())
        ids += new
        supervised += [label] * len(new)
        follows = follows_next
    input_ids = np.array(ids, dtype=np.int64)
    keep = np.array(supervised, dtype=bool)
    for text in TEMPLATES[template].supervised_tokens:
        keep |= input_ids == tokenizer.encode(text, follows="text")[0]
    return TokenizedSample(
        sample_id=sample_id,
        input_ids=input_ids,
        labels=np.where(keep, input_ids, IGNORE_INDEX),
        answer=answer,
    )
