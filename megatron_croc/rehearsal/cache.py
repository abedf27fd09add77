"""Times of layouts that rehearsals keep for later ones."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically
from megatron_croc.native_code import cache_folder
from megatron_croc.rehearsal.versions import installed_versions


@cache
def _code() -> str:
    """Digest of this package's sources and of the libraries' versions."""
    digest = hashlib.sha256(json.dumps(dict(installed_versions()), sort_keys=True).encode())
    package = Path(__file__).parents[1]
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.cpp")]):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


class TimeCache:
    """Results of rehearsed layouts, by all that they depend on, the code included."""

    def __init__(self) -> None:
        """Use the folder `times` of the cache."""
        self._folder = cache_folder() / "times"

    def _path(self, key: Any) -> Path:
        text = json.dumps([key, _code()], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def read(self, key: Any) -> dict[str, Any] | None:
        """The value of a key; None if there is none that can be read."""
        try:
            value = json.loads(self._path(key).read_text())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, key: Any, value: dict[str, Any]) -> None:
        """Keep a value; a folder that cannot be written to keeps nothing."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(key), json.dumps(value).encode())
        except OSError:
            return
