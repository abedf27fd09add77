r"""Sources of samples and their mixture by weight.

    blend.yaml   - {path: captions, weight: 0.7}        paths are relative to the file
                 - {path: [a, b], weight: 0.3, name: instructions}

    samples drawn:  c c i c c i c c c i ...   after any n samples: |drawn of s - share of s * n| < 1

To draw the j-th sample of a source is a job that may start at j / share and must end by
(j + 1) / share. Earliest deadline first meets every deadline (Baruah et al., "Proportionate
progress", 1996), so each source stays within one sample of its share at every prefix. The common
rule, to take the source that lags most, does not guarantee this. Shares are exact fractions. The
next source depends on the counts so far only: the state is one integer per source.
"""

import difflib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_croc.data.store.manifest import content_digest, read_manifest
from megatron_croc.errors import DataError, first_line
from megatron_croc.file_reading import UnreadableError, read_yaml

BLEND_SUFFIXES = (".yaml", ".yml")
"""Suffixes of blend files; any other path is a folder of shards."""

_KEYS = ("path", "weight", "epochs", "name")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Folders of shards that are shuffled as one."""

    name: str
    """Name in logs and checkpoints."""

    folders: tuple[str, ...]
    """Folders of shards."""

    num_samples: int
    """Number of samples in all folders."""

    weight: Fraction
    """Share of the samples drawn, up to a factor common to all sources."""

    digest: str = ""
    """Digest of the content of all folders (manifest.content_digest)."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Sources and their shares."""

    sources: tuple[Source, ...]

    epoch_length: int
    """Number of samples that `train_epochs` counts as one epoch."""

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders, source after source."""
        return tuple(folder for source in self.sources for folder in source.folders)

    def draw(self, counts: Sequence[int], number: int) -> np.ndarray:
        """Choose the sources of the next samples.

        Args:
            counts: samples drawn of each source so far.
            number: samples to draw.

        Returns:
            int64 [number], index of the source of each sample.
        """
        if len(self.sources) == 1:
            return np.zeros(number, dtype=np.int64)
        weights = self._integer_weights()
        total = sum(weights)
        begin = sum(counts)
        taken = list(counts)
        # waiting: (first slot, source) of jobs that may not start yet; ready: (deadline, source).
        waiting = [(n * total // w, s) for s, (n, w) in enumerate(zip(taken, weights, strict=True))]
        heapq.heapify(waiting)
        ready: list[tuple[int, int]] = []
        drawn = np.empty(number, dtype=np.int64)
        for slot in range(begin, begin + number):
            while waiting and waiting[0][0] <= slot:
                source = heapq.heappop(waiting)[1]
                deadline = -(-(taken[source] + 1) * total // weights[source])
                heapq.heappush(ready, (deadline, source))
            source = heapq.heappop(ready)[1]
            drawn[slot - begin] = source
            taken[source] += 1
            heapq.heappush(waiting, (taken[source] * total // weights[source], source))
        return drawn

    def _integer_weights(self) -> list[int]:
        common = math.lcm(*(source.weight.denominator for source in self.sources))
        return [int(source.weight * common) for source in self.sources]


def read_blend(data_path: Sequence[str]) -> Blend:
    """Read the blend of `data_path`: one YAML file, or folders that form a single source.

    Raises:
        DataError: a folder or the file is missing or damaged; names the entry and the key.
    """
    files = [path for path in data_path if path.endswith(BLEND_SUFFIXES)]
    if not files:
        folders = tuple(str(path) for path in data_path)
        name = "+".join(Path(folder).name for folder in folders)
        source = _open_source(name, folders, Fraction(1))
        return Blend(sources=(source,), epoch_length=source.num_samples)
    if len(data_path) > 1:
        raise DataError(
            f"data_path {' '.join(data_path)}: a blend must be the only path; name the folders in "
            f"{files[0]}"
        )
    return _read_file(Path(files[0]))


def _read_file(path: Path) -> Blend:
    try:
        entries = read_yaml(path)
    except (OSError, UnreadableError) as error:
        raise DataError(f"blend {path} cannot be read: {first_line(error)}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"blend {path} must be a list of {{path: FOLDER, weight: NUMBER}}, "
            f"got {type(entries).__name__}"
        )
    by_epochs = [isinstance(entry, dict) and "epochs" in entry for entry in entries]
    if any(by_epochs) and not all(by_epochs):
        raise DataError(
            f"blend {path}: entry {by_epochs.index(False) + 1} has no epochs, but others have: "
            "give every entry a weight, or every entry epochs"
        )
    sources = [_read_entry(path, number, entry) for number, entry in enumerate(entries, start=1)]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"blend {path}: two sources are called {name!r}; give each a name")
    samples = (s.weight if all(by_epochs) else s.num_samples for s in sources)
    return Blend(sources=tuple(sources), epoch_length=math.ceil(sum(samples)))


def _read_entry(path: Path, number: int, entry: object) -> Source:
    where = f"blend {path}, entry {number}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be {{path: FOLDER, weight: NUMBER}}, got {entry!r:.60}")
    for key in entry:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; keys are {', '.join(_KEYS)}"
            raise DataError(f"{where} has the unknown key {key!r}{hint}")
    paths = entry.get("path")
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise DataError(f"{where}: path must name a folder or a list of folders, got {paths!r:.60}")
    folders = tuple(str(path.parent / folder) for folder in paths)
    name = entry.get("name", "+".join(Path(folder).name for folder in folders))
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: name must be a text, got {name!r:.60}")
    if ("weight" in entry) == ("epochs" in entry):
        raise DataError(f"{where} ({name}) needs a weight or epochs, and not both")
    key = "weight" if "weight" in entry else "epochs"
    weight = _positive(entry[key], f"{where} ({name}): {key}")
    source = _open_source(name, folders, weight)
    return replace(source, weight=weight * source.num_samples) if key == "epochs" else source


def _positive(value: object, what: str) -> Fraction:
    """Return a number exactly as written: 0.1 is one tenth, not the nearest float."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        number = Fraction(str(value))
        if number <= 0:
            raise ValueError
    except ValueError:
        raise DataError(f"{what} must be a positive number, got {value!r:.60}") from None
    return number


def _open_source(name: str, folders: tuple[str, ...], weight: Fraction) -> Source:
    """Read the manifests of a source."""
    manifests = [read_manifest(folder) for folder in folders]
    num_samples = sum(manifest.num_samples for manifest in manifests)
    if not num_samples:
        raise DataError(
            f"data_path {', '.join(folders) or 'is empty'}: no samples; give at least one folder "
            "of shards that holds some"
        )
    return Source(
        name=name,
        folders=folders,
        num_samples=num_samples,
        weight=weight,
        digest=content_digest(manifests),
    )
