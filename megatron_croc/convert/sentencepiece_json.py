r"""Conversion of a SentencePiece model to tokenizer.json, the file of Hugging Face's `tokenizers`.

    tokenizer.model --read_model--> SentencePieceModel --sentencepiece_json--> tokenizer.json

The file is written here, without transformers: its converters depend on their version, and on
protobuf's. The model file is a protocol buffer (sentencepiece_model.proto); only the few fields
that decide about ids are read.

The ids are those of training. SentencePiece puts a space before a text ("dummy prefix"), training
also after an image and, with `legacy`, after a special token; see data/sample/tokenization.py:

    legacy    the normalizer puts a space before every text between special tokens
    else      only before a text at the very beginning; the chat template writes the other spaces
"""

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_croc.errors import CheckpointError

SPACE = "\u2581"
"""SentencePiece's mark of a space."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True)
class Piece:
    """One piece; its id is its place in the list."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """Fields of a SentencePiece model that decide about ids."""

    pieces: tuple[Piece, ...]
    byte_fallback: bool
    charsmap: bytes
    """Compiled normalization rules; empty: none."""

    adds_prefix: bool
    strips_spaces: bool
    """True if spaces at both ends are removed, and several in a row become one."""

    @property
    def controls(self) -> dict[str, int]:
        """Ids of the special tokens: begin, end, and others that text cannot spell."""
        kinds = (_CONTROL, _UNKNOWN)
        return {piece.text: id for id, piece in enumerate(self.pieces) if piece.kind in kinds}


def read_model(path: Path) -> SentencePieceModel:
    """Read a .model file.

    Raises:
        CheckpointError: not a SentencePiece model, or one with settings that tokenizer.json cannot
            express.
    """
    try:
        return _parse(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path}: is not a SentencePiece model ({error})") from error


def _parse(content: bytes, path: Path) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    denormalizer: dict[int, Any] = {}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, _NORMAL)))
        elif number in (2, 3, 5):
            {2: trainer, 3: normalizer, 5: denormalizer}[number].update(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    model = SentencePieceModel(
        pieces=tuple(pieces),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        adds_prefix=bool(normalizer.get(3, 1)),
        strips_spaces=bool(normalizer.get(4, 1)),
    )
    faults = {
        # Unigram: a tokenizer.json takes the text "</s>" for the special token's piece.
        "it is not of type BPE": trainer.get(3, _UNIGRAM) != _BPE,
        "its pieces end with spaces (treat_whitespace_as_suffix)": bool(trainer.get(24, 0)),
        "it does not mark spaces (escape_whitespaces is off)": not normalizer.get(5, 1),
        "it changes decoded text (denormalizer_spec)": bool(denormalizer.get(2)),
        "it has user-defined pieces": any(piece.kind == _USER_DEFINED for piece in pieces),
    }
    for fault, is_true in faults.items():
        if is_true:
            raise CheckpointError(
                f"{path}: cannot become a tokenizer.json: {fault}; train with a Hugging Face "
                "tokenizer folder, or export without --tokenizer"
            )
    return model


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protocol buffer: int for varints, bytes for the rest."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number is too long")

    while place < len(content):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}.get(wire, -1)
        if size is None:
            size = varint()
        if size < 0 or place + size > len(content):
            raise ValueError("it ends too early")
        yield number, content[place : place + size]
        place += size


def sentencepiece_json(model: SentencePieceModel, *, legacy: bool) -> dict[str, Any]:
    """Build the content of tokenizer.json, without a token for the image.

    Args:
        model: from read_model.
        legacy: True if a text after a special token begins with a space too.
    """
    normalizers: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.strips_spaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    # A text without its spaces has no prefix to leave out: training puts one before every text.
    every = model.adds_prefix and (legacy or model.strips_spaces)
    if every:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.adds_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(text, id) for text, id in model.controls.items()],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None if every or not model.adds_prefix else first_prefix(),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model),
    }


def first_prefix() -> dict[str, Any]:
    """Build the step that puts a space before a text at the very beginning, and nowhere else.

    Metaspace leaves out its mark where the text begins with it. The normalizer has left no spaces,
    so the first step, whose mark is a space, always adds it; the second makes it SentencePiece's.
    """
    step = {"type": "Metaspace", "split": False}
    return {
        "type": "Sequence",
        "pretokenizers": [
            {**step, "replacement": " ", "prepend_scheme": "first"},
            {**step, "replacement": SPACE, "prepend_scheme": "never"},
        ],
    }


def special_token(text: str, id: int) -> dict[str, Any]:
    """Build the entry of a special token, found in a text as it is written."""
    kinds = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {"id": id, "content": text, **kinds}


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    ids = {piece.text: id for id, piece in enumerate(model.pieces)}
    normal = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    merges: list[tuple[str, str]] = []
    # Better pieces first; a piece of several pairs in the order of the pairs' ids.
    for text in sorted(normal, key=lambda text: (-normal[text], ids[text])):
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _unknown(model).text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [list(pair) for pair in merges],
    }


def _unknown(model: SentencePieceModel) -> Piece:
    return next(piece for piece in model.pieces if piece.kind == _UNKNOWN)
