"""Crash-consistency harness: records what code does to a folder, and rebuilds what may be on disk.

    with Recorder(root) as recorder:
        ...                                  every operation below `root` is recorded
    for state in recorder.states():          after a power cut at any moment
        state.write_to(folder)

Rules of a disk (POSIX, as ext4, XFS and NFS may do it):

- The content of a file is on disk once the file was synced. Before, it may be absent (zero bytes),
  torn (half of it), whole, or what was synced before. What is appended leaves what was synced, and
  what is overwritten in its place is old or new, sector by sector.
- A name (made, moved, removed) is on disk once its folder was synced. Before, each change of a
  name may or may not have happened, whatever happened to the others; one change is never halved.
"""

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

MAX_CHANGES = 7
"""Most unsynced changes of names whose every subset is tried; of more, those that leave out one, or
everything after one."""

CONTENTS = ("whole", "torn", "empty", "old")
"""Fates of content that was not synced; old: as it was synced before."""


@dataclass(eq=False)
class Node:
    """File or folder, whatever its names are."""

    is_folder: bool
    content: bytes = b""
    """Bytes in the page cache."""

    synced: bytes | None = None
    """Bytes on disk; None: never synced."""

    is_cut: bool = True
    """True if the file was emptied or made after its last sync."""

    names: dict[str, "Node"] = field(default_factory=dict)
    """Entries of a folder, as programs see them."""

    on_disk: dict[str, "Node"] = field(default_factory=dict)
    """Entries of a folder at its last sync."""


Change = tuple[tuple[Node, str, Node | None], ...]
"""One change: (folder, name, new node or None) for every name it touches, all at once."""

Tree = dict[str, bytes | None]
"""Relative path -> content; None for a folder."""


@dataclass(frozen=True)
class State:
    """Content of the disk after a power cut."""

    tree: Tree
    moment: int
    """Number of operations before the power cut."""

    last: str
    """Last operation before the power cut."""

    def write_to(self, folder: Path) -> Path:
        """Write the files to an empty folder; returns it."""
        folder.mkdir(parents=True)
        for name, content in sorted(self.tree.items()):
            if content is None:
                (folder / name).mkdir(exist_ok=True)
            else:
                (folder / name).write_bytes(content)
        return folder


class Recorder:
    """Context manager that records operations below a folder, in the order they happen.

    Python's audit events tell of every open, rename, removal and new folder; os.fsync
    and the exchange of names are wrapped, as they have no event.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.tree = Node(is_folder=True)
        self.pending: list[Change] = []
        """Changes of names that were not synced."""
        self.operations: list[str] = []
        self.marks: list[tuple[int, Any]] = []
        self._states: dict[frozenset, State] = {}
        self._is_on = False
        self._lock = threading.RLock()
        self._busy = threading.local()
        self._patch = pytest.MonkeyPatch()
        self._take_in(self.root, self.tree)
        self._settle(self.tree)

    def mark(self, what: Any) -> None:
        """Note that something is promised from this moment on."""
        with self._alone():
            self._before(f"promise {what}")
            self.marks.append((len(self.operations), what))

    def look(self, what: str) -> None:
        """Take in what was written by calls that have no event (os.write)."""
        with self._alone():
            self._before(what)

    def promised(self, state: State) -> list[Any]:
        """Everything that was promised before the moment of a state."""
        return [what for moment, what in self.marks if moment <= state.moment]

    def states(self) -> list[State]:
        """Distinct states of the disk after a power cut, of all moments."""
        return list(self._states.values())

    def __enter__(self) -> "Recorder":
        """Begin to record."""
        from megatron_croc.checkpoint import publishing

        fsync, exchange = os.fsync, publishing.exchange

        def synced(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            with self._alone():
                self._before(f"fsync {path}")
                fsync(handle)
                self._sync(path)

        def exchanged(first: Path, second: Path) -> bool:
            with self._alone():
                self._before(f"exchange {first.name} {second.name}")
                done = exchange(first, second)
                one, other = self._place(first), self._place(second)
                if done and one and other:
                    self._change((*one, other[0].names[other[1]]), (*other, one[0].names[one[1]]))
            return done

        self._patch.setattr(os, "fsync", synced)
        self._patch.setattr(publishing, "exchange", exchanged)
        _RECORDERS.append(self)
        self._is_on = True
        return self

    def __exit__(self, *_: object) -> None:
        """Stop recording."""
        with self._alone():
            self._before("end")
        self._is_on = False
        _RECORDERS.remove(self)
        self._patch.undo()

    def event(self, name: str, args: tuple[Any, ...]) -> None:
        """Take in one audit event, which comes before its operation."""
        if self._is_on and name in _EVENTS and not getattr(self._busy, "own", False):
            with self._alone():
                _EVENTS[name](self, args)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Stop other threads, and record nothing of what the recorder itself does."""
        with self._lock:
            self._busy.own = True
            try:
                yield
            finally:
                self._busy.own = False

    # What the operations do.

    def _open(self, args: tuple[Any, ...]) -> None:
        path, _, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if isinstance(path, int) or not writes or (place := self._place(path)) is None:
            return
        self._before(f"open {path}")
        folder, name = place
        if name not in folder.names:
            self._change((folder, name, Node(is_folder=False)))
        elif flags & os.O_TRUNC:
            folder.names[name].is_cut = True

    def _mkdir(self, args: tuple[Any, ...]) -> None:
        path, _, handle = (*args, -1)[:3]
        if (place := self._place(path, handle)) is not None:
            self._before(f"mkdir {path}")
            if place[1] not in place[0].names:
                self._change((*place, Node(is_folder=True)))

    def _remove(self, args: tuple[Any, ...]) -> None:
        path, handle = (*args, -1)[:2]
        if (place := self._place(path, handle)) is not None:
            self._before(f"remove {path}")
            self._change((*place, None))

    def _rename(self, args: tuple[Any, ...]) -> None:
        source, target = self._place(args[0]), self._place(args[1])
        if source is not None and target is not None:
            self._before(f"rename {args[0]} {args[1]}")
            self._change((*target, source[0].names[source[1]]), (*source, None))

    def _change(self, *names: tuple[Node, str, Node | None]) -> None:
        for folder, name, node in names:
            if node is None:
                folder.names.pop(name, None)
            else:
                folder.names[name] = node
        self.pending.append(names)

    def _sync(self, path: str) -> None:
        if (node := self._node(path)) is None:
            return
        if node.is_folder:
            synced = [c for c in self.pending if any(folder is node for folder, _, _ in c)]
            for change in synced:
                _apply(change)
            self.pending = [change for change in self.pending if change not in synced]
        else:
            node.synced = node.content = Path(path).read_bytes()
            node.is_cut = False

    # Where things are.

    def _place(self, path: Any, handle: int = -1) -> tuple[Node, str] | None:
        """(folder, name) of a path below the root; None elsewhere."""
        path = os.fsdecode(path)
        if handle not in (-1, None):
            path = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), path)
        path = os.path.abspath(path)
        if not path.startswith(f"{self.root}/"):
            return None
        folder = self._node(os.path.dirname(path))
        return None if folder is None else (folder, os.path.basename(path))

    def _node(self, path: str) -> Node | None:
        if path != str(self.root) and not path.startswith(f"{self.root}/"):
            return None
        node: Node | None = self.tree
        for part in Path(path).relative_to(self.root).parts:
            node = None if node is None else node.names.get(part)
        return node

    def _take_in(self, path: Path, node: Node) -> None:
        """Read the content of files that were written since the last look."""
        for name, child in list(node.names.items()):
            if child.is_folder:
                self._take_in(path / name, child)
            elif (path / name).exists():
                child.content = (path / name).read_bytes()
        for entry in path.iterdir() if not self.operations else ():
            if entry.name not in node.names:
                child = Node(is_folder=entry.is_dir())
                node.names[entry.name] = child
                if child.is_folder:
                    self._take_in(entry, child)
                else:
                    child.content = entry.read_bytes()

    def _settle(self, node: Node) -> None:
        """Everything that is there at the start is on disk."""
        node.on_disk, node.synced, node.is_cut = dict(node.names), node.content, False
        for child in node.names.values():
            self._settle(child)

    def _before(self, operation: str) -> None:
        self._look()
        self.operations.append(operation)

    # States after a power cut.

    def _look(self) -> None:
        """Add the states that a power cut at this moment may leave."""
        self._take_in(self.root, self.tree)
        last = self.operations[-1] if self.operations else "start"
        for happened in _subsets(self.pending):
            entries = _entries_after(happened)
            for fate in self._fates(entries):
                tree = dict(_read(self.tree, entries, fate, ""))
                # A promise counts from its moment on: keep the latest moment of a state.
                self._states[frozenset(tree.items())] = State(tree, len(self.operations), last)

    def _fates(self, entries: Callable[[Node], dict[str, Node]]) -> Iterator[dict[int, str]]:
        """Fates of all files with unsynced content: all alike, or one unlike the others."""
        unsynced = [n for n in _files(self.tree, entries) if n.synced != n.content]
        if not unsynced:
            yield {}
            return
        for fate in CONTENTS:
            yield {id(node): fate for node in unsynced}
        for odd, (fate, other) in itertools.product(
            unsynced, itertools.permutations(CONTENTS, 2) if len(unsynced) > 1 else ()
        ):
            yield {id(node): other if node is odd else fate for node in unsynced}


_EVENTS: dict[str, Callable[[Recorder, tuple[Any, ...]], None]] = {
    "open": Recorder._open,
    "os.mkdir": Recorder._mkdir,
    "os.remove": Recorder._remove,
    "os.rmdir": Recorder._remove,
    "os.rename": Recorder._rename,
}

_RECORDERS: list[Recorder] = []


def _audit(name: str, args: tuple[Any, ...]) -> None:
    for recorder in _RECORDERS:
        recorder.event(name, args)


sys.addaudithook(_audit)  # cannot be removed; does nothing without a recorder


def _apply(change: Change) -> None:
    for folder, name, node in change:
        if node is None:
            folder.on_disk.pop(name, None)
        else:
            folder.on_disk[name] = node


def _subsets(pending: list[Change]) -> Iterator[list[Change]]:
    """Unsynced changes that have happened: every subset of few, a choice of many."""
    if len(pending) <= MAX_CHANGES:
        for number in range(len(pending) + 1):
            yield from map(list, itertools.combinations(pending, number))
        return
    yield from (pending[:n] for n in range(len(pending) + 1))
    yield from ([*pending[:n], *pending[n + 1 :]] for n in range(len(pending)))
    yield from ([change] for change in pending)


def _entries_after(happened: list[Change]) -> Callable[[Node], dict[str, Node]]:
    """Entries of folders on disk, with some of the unsynced changes."""
    changed: dict[int, dict[str, Node]] = {}
    for change in happened:
        for folder, name, node in change:
            names = changed.setdefault(id(folder), dict(folder.on_disk))
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node
    return lambda folder: changed.get(id(folder), folder.on_disk)


def _files(node: Node, entries: Callable[[Node], dict[str, Node]]) -> Iterator[Node]:
    for child in entries(node).values():
        if child.is_folder:
            yield from _files(child, entries)
        else:
            yield child


def _read(
    node: Node, entries: Callable[[Node], dict[str, Node]], fate: dict[int, str], prefix: str
) -> Iterator[tuple[str, bytes | None]]:
    for name, child in entries(node).items():
        path = f"{prefix}{name}"
        if child.is_folder:
            yield path, None
            yield from _read(child, entries, fate, f"{path}/")
            continue
        yield path, _content_after(child, fate.get(id(child), "old"))


def _content_after(file: Node, fate: str) -> bytes:
    """Content of a file after a power cut."""
    content, synced = file.content, file.synced or b""
    if fate in ("whole", "old"):
        return content if fate == "whole" else synced
    if not content.startswith(synced) and not file.is_cut:  # overwritten in its place
        sectors = len(content) // 2 // SECTOR if fate == "torn" else 0
        return content[: sectors * SECTOR] + synced[sectors * SECTOR :]
    kept = len(synced) if content.startswith(synced) else 0  # what was appended to
    return content[: (kept + len(content)) // 2 if fate == "torn" else kept]
