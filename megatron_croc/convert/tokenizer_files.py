"""Tokenizer of an export: tokenizer.json, its settings and the chat template.

    tokenizer.model (SentencePiece) --+                    tokenizer.json       ids of training
    Hugging Face directory -----------+--write_tokenizer-> tokenizer_config.json
                                                           chat_template.jinja  prompts of training
                                                           tokenizer.model      copied, if given

tokenizer.json holds everything that decides about ids, and every version of transformers reads it
as it is (class PreTrainedTokenizerFast); other classes build it anew from other files, and differ
between versions. It adds no token to a text: the chat template writes the first one.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_croc.config.data import DataConfig, TemplateName, TokenizerType
from megatron_croc.convert.chat_templates import ESCAPE, Words, chat_template
from megatron_croc.convert.export_config import IMAGE_TOKEN
from megatron_croc.convert.exported_tokenizer import normalizer_rules
from megatron_croc.convert.sentencepiece_json import (
    first_prefix,
    read_model,
    sentencepiece_json,
    special_token,
)
from megatron_croc.convert.tensor_files import read_json
from megatron_croc.data.sample.conversation import BOS, EOS
from megatron_croc.data.sample.tokenization import (
    Tokenizer,
    build_tokenizer,
    check_tokenizer,
    stop_ids,
)
from megatron_croc.errors import CheckpointError, DataError

_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class ImageToken:
    """Id of IMAGE_TOKEN, and ids of the special tokens of generation."""

    id: int
    specials: dict[str, int] = field(default_factory=dict)
    """Ids of bos, eos and pad."""

    tokenizer_type: TokenizerType | None = None
    """Library that reads the written tokenizer; None: no tokenizer was written."""

    stops: tuple[int, ...] = ()
    """Ids that end an answer."""

    num_words: int | None = None
    """Number of ids of training; no id from here on is generated."""


def copy_tokenizer(source: Path, folder: Path) -> ImageToken:
    """Copy a tokenizer into an export in the layout of a release, as it is.

    Raises:
        CheckpointError: not a tokenizer.
    """
    present = _present(source)
    for path in present:
        name = "tokenizer.model" if path == source else path.name
        shutil.copyfile(path, folder / name)
    training = _training_tokenizer(source, _tokenizer_type(source, "SentencePieceTokenizer"))
    if not (folder / "tokenizer_config.json").exists():
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": training.legacy}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ImageToken(training.size, _special_ids(training, source, training.special_ids))


def write_tokenizer(
    source: Path,
    folder: Path,
    *,
    template: TemplateName,
    tokenizer_type: TokenizerType = "SentencePieceTokenizer",
) -> ImageToken:
    """Write a tokenizer into an export, with the chat template.

    Args:
        source: a SentencePiece file, or a Hugging Face directory.
        folder: the export.
        template: conversation template of training.
        tokenizer_type: of training; decides which file of a directory is meant if it has both.

    Raises:
        CheckpointError: not a tokenizer; or one whose ids a tokenizer.json cannot give.
    """
    _present(source)
    kind = _tokenizer_type(source, tokenizer_type)
    training = _training_tokenizer(source, kind)
    if kind == "SentencePieceTokenizer":
        model = source / "tokenizer.model" if source.is_dir() else source
        content = sentencepiece_json(read_model(model), legacy=training.legacy)
        shutil.copyfile(model, folder / "tokenizer.model")
    else:
        content = _huggingface_json(source, training)
    image_id = _adapt(content)
    text = json.dumps(content, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    known = {token["content"]: token["id"] for token in content["added_tokens"]}
    ids = _special_ids(training, source, known)
    words = _words(content, ids, training)
    config = _config(content, ids, legacy=training.legacy)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template(template, words), encoding="utf-8")
    _check_ids(text, training)
    try:
        stops = stop_ids(training, template)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return ImageToken(image_id, ids, kind, stops, training.size)


def check_same_tokenizer(source: Path, data: DataConfig, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the run's, or does not fit its model or template.

    Raises:
        CheckpointError: not a tokenizer, or another one than the run's, where that is at hand.
    """
    _present(source)
    given = _training_tokenizer(source, _tokenizer_type(source, data.tokenizer_type))
    try:
        check_tokenizer(given, data.conversation_template, vocab_size)
    except DataError as error:
        raise CheckpointError(f"--tokenizer {source}: is not the run's: {error}") from error
    named = None if data.tokenizer_model is None else Path(data.tokenizer_model)
    if named is None or not named.exists():
        return
    trained = _training_tokenizer(named, _tokenizer_type(named, data.tokenizer_type))
    different = differences(given, trained)
    if given.special_ids != trained.special_ids or given.size != trained.size:
        different.append("special tokens")
    if different:
        raise CheckpointError(
            f"--tokenizer {source}: is not the tokenizer of the run, {named}: other ids for "
            f"{different[0]!r}; export with --tokenizer {named}"
        )


def differences(given: Tokenizer, trained: Tokenizer) -> list[str]:
    """Return texts, and kinds of texts, that two tokenizers encode differently."""
    different = [probe for probe in _PROBES if given.encode(probe) != trained.encode(probe)]
    if given.adds_prefix and given.legacy != trained.legacy:
        different.append("a text after a special token (`legacy` in tokenizer_config.json)")
    return different


def _present(source: Path) -> list[Path]:
    """Return the files of a tokenizer; CheckpointError if it is none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such file or directory")
    present = [source / name for name in _FILES if (source / name).is_file()]
    if not {"tokenizer.model", "tokenizer.json", "vocab.json"} & {path.name for path in present}:
        raise CheckpointError(f"{source}: no tokenizer there ({', '.join(_FILES[:2])})")
    return present


def _tokenizer_type(source: Path, wanted: TokenizerType) -> TokenizerType:
    if source.is_file():
        return "SentencePieceTokenizer"
    if wanted == "SentencePieceTokenizer" and (source / "tokenizer.model").is_file():
        return wanted
    return "HuggingFaceTokenizer"


def _training_tokenizer(source: Path, kind: TokenizerType) -> Tokenizer:
    if kind == "SentencePieceTokenizer" and source.is_dir():
        source = source / "tokenizer.model"
    try:
        return build_tokenizer(kind, str(source))
    except ImportError as error:
        raise CheckpointError(
            f"{source}: transformers is needed for this: pip install -e '.[hf]'"
        ) from error
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _huggingface_json(source: Path, training: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer.json that training uses, with the prefix where training puts it."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(
        str(source), local_files_only=True, trust_remote_code=False
    )
    content = json.loads(loaded.backend_tokenizer.to_str())
    if not training.adds_prefix:
        return content
    scheme = "always" if training.legacy else "first"
    steps = content.get("pre_tokenizer") or {}
    metaspaces = [
        step
        for step in (steps, *steps.get("pretokenizers", []))
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"
    ]
    for step in metaspaces:
        step["prepend_scheme"] = scheme
    rules = (content.get("normalizer") or {}).get("normalizers", [])
    if not metaspaces and not training.legacy and not steps:
        kept = [rule for rule in rules if rule.get("type") != "Prepend"]
        content["normalizer"]["normalizers"] = kept
        content["pre_tokenizer"] = first_prefix()
    return content


def _adapt(content: dict[str, Any]) -> int:
    """Add IMAGE_TOKEN and the removal of ESCAPE; return the image token's id."""
    content |= {"truncation": None, "padding": None, "post_processor": None}
    remove = {"type": "Replace", "pattern": {"String": ESCAPE}, "content": ""}
    rules = [rule for rule in normalizer_rules(content["normalizer"]) if rule != remove]
    content["normalizer"] = {"type": "Sequence", "normalizers": [remove, *rules]}
    added = [token for token in content["added_tokens"] if token["content"] != IMAGE_TOKEN]
    for token in added:
        if token["special"]:
            token["normalized"] = False  # found in the text as it is written, before the rules
    ids = _all_ids(content)
    image_id = ids.get(IMAGE_TOKEN, max(ids.values(), default=-1) + 1)
    content["added_tokens"] = sorted(
        [*added, special_token(IMAGE_TOKEN, image_id)], key=lambda token: token["id"]
    )
    return image_id


def _all_ids(content: dict[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (piece, score)
        vocabulary = {piece[0]: number for number, piece in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in content["added_tokens"]}


def _special_ids(training: Tokenizer, source: Path, known: dict[str, int]) -> dict[str, int]:
    """Return the ids of bos, eos and pad; without a pad token of its own, unknown or eos pads.

    Args:
        training: tokenizer of training.
        source: its file or directory.
        known: ids of the special tokens by their texts.
    """
    names = {"bos": training.special_ids.get(BOS), "eos": training.special_ids.get(EOS)}
    folder = source if source.is_dir() else source.parent
    config = folder / "tokenizer_config.json"
    token = read_json(config).get("pad_token") if config.is_file() else None
    pad = token.get("content") if isinstance(token, dict) else token
    named = (known.get(name) for name in (pad, "<unk>") if name is not None)
    names["pad"] = next((id for id in named if id is not None), names["eos"])
    return {name: id for name, id in names.items() if id is not None}


def _words(content: dict[str, Any], ids: dict[str, int], training: Tokenizer) -> Words:
    texts = {token["id"]: token["content"] for token in content["added_tokens"]}
    is_metaspace = (content["pre_tokenizer"] or {}).get("type") == "Metaspace"
    strips = any(rule["type"] == "Strip" for rule in content["normalizer"]["normalizers"])
    return Words(
        bos=texts.get(ids.get("bos", -1), ""),
        eos=texts.get(ids.get("eos", -1), ""),
        specials=tuple(t["content"] for t in content["added_tokens"] if t["special"]),
        writes_prefix=training.adds_prefix and not training.legacy and not strips,
        doubles_space=not is_metaspace,
    )


def _config(content: dict[str, Any], ids: dict[str, int], *, legacy: bool) -> dict[str, Any]:
    """Build tokenizer_config.json."""
    texts = {token["id"]: token["content"] for token in content["added_tokens"]}
    unknown = content["model"].get("unk_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "model_input_names": ["input_ids", "attention_mask"],
        **{f"{name}_token": texts[id] for name, id in ids.items() if id in texts},
        **({"unk_token": unknown} if unknown is not None else {}),
        "padding_side": "left",  # generation appends at the right end
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in content["added_tokens"]
        },
    }


_PROBES = (
    "Is there a red circle?",
    " two  spaces ",
    "first line\n\nthird\tline",
    "naïve café, 12345 and 日本語 \U0001f600",
    "<s> </s> <unk> <|im_start|>user",
)
"""Texts whose ids are compared at every export."""


def _check_ids(text: str, training: Tokenizer) -> None:
    """CheckpointError if the written tokenizer gives other ids than training."""
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:  # comes with transformers, which is optional
        return
    written = Backend.from_str(text)
    encoders: dict[str, Callable[[str], list[int]]] = {"at the start": training.encode}
    specials = {"": "at the start"}
    if (eos := training.eos_id) is not None and (token := written.id_to_token(eos)) is not None:
        encoders["after a special token"] = lambda probe: [
            eos,
            *training.encode(probe, follows="special"),
        ]
        specials[token] = "after a special token"
    tokens = [t.content for t in written.get_added_tokens_decoder().values() if t.special]
    for before, place in specials.items():
        for probe in _PROBES:
            escaped = probe
            for token in tokens:
                escaped = escaped.replace(token, token[0] + ESCAPE + token[1:])
            ids = written.encode(before + escaped, add_special_tokens=False).ids
            if ids != encoders[place](probe):
                raise CheckpointError(
                    f"tokenizer {training.name}: {probe!r} {place} has other ids in a "
                    "tokenizer.json than in training; export without --tokenizer and use "
                    "croc generate --tokenizer"
                )
