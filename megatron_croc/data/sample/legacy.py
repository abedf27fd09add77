"""The `legacy` flag of a LLaMA tokenizer folder, decided from the folder's files.

    tokenizer_config.json: "legacy"          says it
    written by transformers 5, no key        False, as transformers 5 itself then takes
    tokenizer.json: a space before all text  True (Prepend; Metaspace "always")
    tokenizer.json: only before the first    False (Metaspace "first")
    nothing of these                         True, as transformers 4 takes

The flag decides every token behind a special token (tokenization.py).
"""

from pathlib import Path
from typing import Any, NamedTuple

from megatron_croc.errors import DataError
from megatron_croc.file_reading import UnreadableError, read_json, whole_number


class Legacy(NamedTuple):
    """Value of the flag, and the file that it follows from."""

    value: bool
    reason: str


def decide_legacy(folder: Path) -> Legacy:
    """Decide the flag of a folder.

    Raises:
        DataError: a file of the folder is not valid JSON.
    """
    config = _read(folder / "tokenizer_config.json")
    if isinstance(flag := config.get("legacy"), bool):
        return Legacy(flag, f'"legacy" in {folder / "tokenizer_config.json"}')
    scheme = _puts_space_everywhere(_read(folder / "tokenizer.json"))
    # transformers 5 drops the key when it writes a folder, and adds "backend".
    is_five = "backend" in config or _major(config) >= 5
    rebuilds = "Llama" in str(config.get("tokenizer_class", ""))  # from the vocabulary, by the key
    if is_five and (rebuilds or scheme is None):
        but = ", although its tokenizer.json puts a space before every text" if scheme else ""
        return Legacy(
            False, f"no key in {folder}, which transformers 5 wrote and reads as False{but}"
        )
    if scheme is not None:
        where = "every text" if scheme else "the first text only"
        return Legacy(scheme, f"{folder / 'tokenizer.json'} puts a space before {where}")
    if _major(_read(folder / "config.json")) >= 5:
        return Legacy(False, f"no key in {folder}, which transformers 5 wrote and reads as False")
    return Legacy(True, f"no file in {folder} says it: the value of transformers 4")


def _major(config: dict[str, Any]) -> int:
    return whole_number(str(config.get("transformers_version", "")).partition(".")[0]) or 0


def _puts_space_everywhere(tokenizer: dict[str, Any]) -> bool | None:
    """Return the flag that tokenizer.json implies; None: it puts no space, or is not there."""
    normalizer, pre_tokenizer = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if any(step.get("type") == "Prepend" for step in _steps(normalizer, "normalizers")):
        return True
    for step in _steps(pre_tokenizer, "pretokenizers"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme") or (
                "always" if step.get("add_prefix_space", True) else "never"
            )
            return {"always": True, "first": False}.get(str(scheme))
    return None


def _steps(part: object, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer: of a sequence each, else itself."""
    if not isinstance(part, dict):
        return []
    inside = part.get(key)
    return [one for one in inside if isinstance(one, dict)] if isinstance(inside, list) else [part]


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnreadableError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
