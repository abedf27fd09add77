"""Read the tokenizer.json of an export, as written or saved again by transformers."""

from pathlib import Path
from typing import Any

from megatron_croc.convert.chat_templates import ESCAPE
from megatron_croc.convert.export_config import IMAGE_TOKEN
from megatron_croc.convert.sentencepiece_json import SPACE
from megatron_croc.convert.tensor_files import read_json
from megatron_croc.data.sample.conversation import BOS, EOS
from megatron_croc.data.sample.tokenization import Tokenizer
from megatron_croc.errors import DataError


def normalizer_rules(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer.json's normalizer in order."""
    if normalizer is None:
        return []
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]


def is_own_tokenizer(folder: Path) -> bool:
    """Return True if a folder has a tokenizer.json that this program wrote; saving keeps it so."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    rules = normalizer_rules(read_json(path).get("normalizer"))
    return any(rule.get("pattern") == {"String": ESCAPE} for rule in rules)


def read_exported(folder: Path) -> Tokenizer:
    """Load an export's tokenizer.json with training's interface.

    Its settings of the prefix are found by trying: a folder saved again by transformers has lost
    the flag `legacy`, but not the rules.

    Raises:
        DataError: no tokenizer there, or not a tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{folder}: has no tokenizer; give one with --tokenizer")
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise DataError(f"{path}: transformers is needed: pip install -e '.[hf]'") from error
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library has no class for it
        raise DataError(f"{path}: is not a tokenizer.json: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = read_json(folder / "tokenizer_config.json")
    specials = {
        token.content: id
        for id, token in backend.get_added_tokens_decoder().items()
        if token.special and token.content != IMAGE_TOKEN
    }
    first = next(iter(specials), "")
    following = backend.encode(first + "a", add_special_tokens=False).tokens[1:]
    for name in (BOS, EOS):
        token = config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in specials:
            specials[name] = specials[content]
    backend.encode_special_tokens = True
    image = backend.token_to_id(IMAGE_TOKEN)
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(
        name=str(path),
        size=size - 1 if image == size - 1 else size,
        special_ids=specials,
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
        adds_prefix=backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE),
        legacy=any(token.startswith(SPACE) for token in following),
    )
