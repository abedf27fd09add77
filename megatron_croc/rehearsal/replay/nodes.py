"""Work on the devices of all ranks, and the places where ranks meet.

A node is one piece of work: it is ready when all it depends on is done and all ranks it needs are
ready too, and it is done `seconds` later. Times follow from this alone (the longest path), so there
is no clock; work that runs at the same time is not slowed by it.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A node's part of the step, for the timeline and for messages."""

    name: str
    place: str = ""
    lane: str = ""
    """Name of the stream (`compute`), or of the group."""

    axes: tuple[str, ...] = ()
    """Axes along which its group extends."""

    phase: str = ""
    micro_batch: int | None = None
    direction: str = ""
    chunk: int = 0


class Node:
    """One piece of work of one rank, or a wait of its host."""

    __slots__ = (
        "after",
        "before",
        "busy",
        "end",
        "freed",
        "label",
        "left",
        "meeting",
        "on_ready",
        "rank",
        "ready",
    )

    def __init__(self, rank: int, label: Label, on_ready: Callable[["Node"], None]) -> None:
        """A node that depends on nothing yet."""
        self.rank = rank
        self.label = label
        self.on_ready = on_ready
        self.ready = 0.0
        """Seconds at which all it depends on is done and its host has called it."""
        self.freed = 0.0
        """Seconds at which all it depends on is done, whenever its host calls."""
        self.busy = 0.0
        """Seconds for which it occupies device or link."""
        self.end: float | None = None
        """Seconds at which it is done; None: not yet."""
        self.meeting: Meeting | None = None
        self.left = 1
        """Dependencies that are not done; one more until it is closed."""
        self.before: list[Node] = []
        self.after: list[Node] = []

    def depend(self, end: float) -> None:
        """Begin no sooner than `end`."""
        self.freed = max(self.freed, end)
        self.ready = max(self.ready, end)


class Board:
    """Works off nodes whose dependencies are done."""

    def __init__(self, on_done: Callable[[Node], None]) -> None:
        """Call `on_done` for each node that is done."""
        self._on_done = on_done
        self._done: deque[Node] = deque()

    def submit(self, node: Node, before: Iterable[Node], *, not_before: float) -> None:
        """Add a node that depends on others, and begins no sooner than `not_before`."""
        node.ready, node.freed = not_before, 0.0
        for other in before:
            if other.end is None:
                node.left += 1
                node.before.append(other)
                other.after.append(node)
            else:
                node.depend(other.end)
        self._arrive(node)
        self._work()

    def finish(self, node: Node, end: float) -> None:
        """Mark a node as done; those that depend on it follow with the next submission."""
        node.end = end
        self._done.append(node)

    def _arrive(self, node: Node) -> None:
        node.left -= 1
        if node.left == 0:
            node.before = []
            node.on_ready(node)

    def _work(self) -> None:
        while self._done:
            node = self._done.popleft()
            assert node.end is not None
            self._on_done(node)
            for other in node.after:
                other.depend(node.end)
                self._arrive(other)
            node.after = []


@dataclass(slots=True)
class Meeting:
    """One collective: done `seconds` after the last of its ranks is ready."""

    needed: frozenset[int]
    signature: tuple[str, str, int]
    """(kind, dtype, bytes) of the rank that called first."""

    first: tuple[int, str]
    """(rank, place) of the first call."""

    seconds: float = 0.0
    calls: int = 0

    waiting: list[Node] = field(default_factory=list)
    """Nodes that are ready."""

    def absent(self) -> list[int]:
        """Ranks that are not ready."""
        return sorted(self.needed - {node.rank for node in self.waiting})

    def arrive(self, board: Board, node: Node) -> None:
        """Take a ready node; with the last one all are done."""
        self.waiting.append(node)
        if len(self.waiting) == len(self.needed):
            end = max(other.ready for other in self.waiting) + self.seconds
            for other in self.waiting:
                other.busy = self.seconds
                board.finish(other, end)


@dataclass(slots=True)
class Message:
    """One send and its receive."""

    sender: int
    receiver: int
    seconds: float
    dtype: str
    num_bytes: int
    place: str
    """Place of the side that came first."""

    sides: dict[int, Node] = field(default_factory=dict)
    """Rank -> its node, once its host has called."""

    ready: dict[int, float] = field(default_factory=dict)

    def other(self, rank: int) -> int:
        """The rank on the other side."""
        return self.receiver if rank == self.sender else self.sender


class Exchanges:
    """Nodes of sends and receives, each with all messages of its batch."""

    def __init__(self, board: Board, *, buffers_sends: bool) -> None:
        """Messages are worked off on `board`."""
        self._board = board
        self._buffers = buffers_sends
        self.messages: dict[Node, list[Message]] = {}
        """Open node -> its messages that are not done."""

        self._last: dict[Node, float] = {}

    def arrive(self, node: Node) -> None:
        """Take a ready node: all its messages begin together."""
        for message in list(self.messages[node]):
            message.ready[node.rank] = node.ready
            if self._buffers and node.rank == message.sender:
                self._settle(node, message, node.ready + message.seconds)
            if len(message.ready) == 2:
                end = max(message.ready.values()) + message.seconds
                open_sides = [message.receiver]
                if not self._buffers:
                    open_sides.append(message.sender)
                for rank in open_sides:
                    self._settle(message.sides[rank], message, end)

    def _settle(self, node: Node, message: Message, end: float) -> None:
        remaining = self.messages[node]
        remaining.remove(message)
        self._last[node] = max(self._last.get(node, 0.0), end)
        node.busy = max(node.busy, message.seconds)
        if not remaining:
            del self.messages[node]
            self._board.finish(node, self._last.pop(node))

    def absent(self, node: Node) -> list[int]:
        """Ranks for which a ready node waits."""
        return sorted(
            {
                message.other(node.rank)
                for message in self.messages.get(node, ())
                if message.other(node.rank) not in message.ready
            }
        )


@dataclass(slots=True)
class FirstUse:
    """The hosts that have come to the first use of a communicator, or of two ranks of it."""

    name: str
    needed: frozenset[int]
    arrived: dict[int, tuple[float, str]] = field(default_factory=dict)
    """Rank -> (time of its host, place)."""

    is_over: bool = False
    time: float = 0.0

    def arrive(self, rank: int, now: float, place: str) -> bool:
        """Take a host; return True if all have come."""
        self.arrived[rank] = now, place
        if set(self.arrived) >= self.needed:
            self.is_over = True
            self.time = max(moment for moment, _ in self.arrived.values())
        return self.is_over

    def absent(self) -> list[int]:
        """Ranks whose host has not come."""
        return sorted(self.needed - set(self.arrived))
