"""Write the tokenizer of an export: copied files and one more token, `<image>`.

Files are copied and two JSON files edited directly, as saving with transformers would change them
depending on its version.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_croc.config.data import TemplateName
from megatron_croc.convert.export_config import IMAGE_TOKEN
from megatron_croc.convert.tensor_files import read_json
from megatron_croc.data.sample.conversation import IM_END, IM_START, QWEN_SYSTEM, VICUNA_SYSTEM
from megatron_croc.errors import CheckpointError

_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

# The content of a message is a text, or a list of texts and images.
_CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
_CHAT: dict[TemplateName, str] = {
    "plain": "{% for m in messages %}" + _CONTENT + "{% endfor %}",
    "v1": (
        f"{{{{ bos_token }}}}{VICUNA_SYSTEM}"
        "{% for m in messages %}{% if m['role'] == 'user' %} USER: "
        + _CONTENT
        + "{% else %} ASSISTANT: "
        + _CONTENT
        + "{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
    "qwen_1_5": (
        f"{IM_START}system\n{QWEN_SYSTEM}{IM_END}\n"
        f"{{% for m in messages %}}{IM_START}{{{{ m['role'] }}}}\n"
        + _CONTENT
        + f"{IM_END}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{IM_START}assistant\n{{% endif %}}"
    ),
}


@dataclass(frozen=True)
class ImageToken:
    """Id of IMAGE_TOKEN, and ids of the special tokens of generation."""

    id: int
    specials: dict[str, int] = field(default_factory=dict)
    """Ids of bos, eos and pad."""


def write_tokenizer(
    source: Path, folder: Path, *, template: TemplateName, add: bool = True
) -> ImageToken:
    """Copy a tokenizer into an export, with a chat template.

    Args:
        source: a SentencePiece file, or a Hugging Face directory.
        folder: the export.
        template: conversation template of training.
        add: add IMAGE_TOKEN if the tokenizer lacks it.

    Raises:
        CheckpointError: not a tokenizer.
    """
    if source.is_dir():
        present = [name for name in _FILES if (source / name).is_file()]
        if not {"tokenizer.model", "tokenizer.json", "vocab.json"} & set(present):
            raise CheckpointError(f"{source}: no tokenizer there ({', '.join(_FILES[:2])})")
        for name in present:
            shutil.copyfile(source / name, folder / name)
    elif source.is_file():
        shutil.copyfile(source, folder / "tokenizer.model")
    else:
        raise CheckpointError(f"{source}: no such file or directory")
    config = _config(folder)
    ids = _known_ids(folder, config)
    image_id = ids.get(IMAGE_TOKEN, max(ids.values(), default=-1) + 1)
    if add:
        _add_image_token(folder, config, image_id)
        (folder / "chat_template.jinja").write_text(_CHAT[template])
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ImageToken(image_id, _special_ids(config, ids))


def _config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json if it exists; fill in the defaults of a Llama tokenizer."""
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer"}
    if path.exists():
        config |= read_json(path)
    if config["tokenizer_class"].startswith("LlamaTokenizer"):
        config.setdefault("legacy", True)
        for name, token in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>")):
            config.setdefault(f"{name}_token", token)
        config.setdefault("pad_token", config["unk_token"])
    config["padding_side"] = "left"  # generation appends at the right end
    return config


def _known_ids(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Return the id of each token; for SentencePiece, the id of each piece."""
    ids: dict[str, int] = {}
    if (path := folder / "tokenizer.json").exists():
        content = read_json(path)
        vocabulary = content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # Unigram: (piece, score)
            vocabulary = {piece[0]: number for number, piece in enumerate(vocabulary)}
        ids |= vocabulary
        ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    elif (path := folder / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor()
        pieces.Load(str(path))
        ids |= {pieces.IdToPiece(number): number for number in range(pieces.GetPieceSize())}
    else:
        ids |= read_json(folder / "vocab.json")
    if (path := folder / "added_tokens.json").exists():
        ids |= read_json(path)
    added = config.get("added_tokens_decoder", {})
    return ids | {token["content"]: int(number) for number, token in added.items()}


def _add_image_token(folder: Path, config: dict[str, Any], image_id: int) -> None:
    token = {
        "content": IMAGE_TOKEN,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    config.setdefault("added_tokens_decoder", {})[str(image_id)] = token
    config.pop("chat_template", None)  # replaced by chat_template.jinja
    config["processor_class"] = "LlavaProcessor"
    if (path := folder / "tokenizer.json").exists():
        content = read_json(path)
        added = [t for t in content.get("added_tokens", []) if t["content"] != IMAGE_TOKEN]
        content["added_tokens"] = [*added, {"id": image_id, **token}]
        path.write_text(json.dumps(content, ensure_ascii=False))


def _special_ids(config: dict[str, Any], ids: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in ("bos", "eos", "pad"):
        token = config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            found[name] = ids[content]
    return found
