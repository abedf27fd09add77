"""State of one rank's host while its events are worked off."""

from collections import Counter
from dataclasses import dataclass, field

from megatron_croc.rehearsal.replay.nodes import FirstUse, Node
from megatron_croc.rehearsal.replay.programs import Member
from megatron_croc.rehearsal.trace import Event, Mark

Communicator = tuple[str, tuple[int, ...]]
"""Name and ranks of a group, or of a pair of its ranks."""


@dataclass
class Host:
    """The host of one rank: its clock, its next event, its streams and handles."""

    member: Member
    now: float = 0.0
    position: int = 0
    mark: Mark = field(default_factory=Mark)
    tails: dict[int, list[Node]] = field(default_factory=dict)
    """Stream -> all that its next work depends on."""

    channels: dict[Communicator, Node] = field(default_factory=dict)
    """Communicator -> its last operation."""

    works: dict[int, Node] = field(default_factory=dict)
    recorded: dict[int, list[Node]] = field(default_factory=dict)
    """Number of a recorded event -> what it waits for."""

    open_sends: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Storage that an open send reads -> (work, description)."""

    calls: Counter[Communicator] = field(default_factory=Counter)
    """Collectives called so far."""

    order: list[Communicator] = field(default_factory=list)
    """The communicator of each of them, in order."""

    why: tuple[str, str] = ("", "")
    """(call, place) of the present wait."""

    waits_for: list[Node] = field(default_factory=list)
    """Work for which the host waits."""

    comes_to: list[FirstUse] = field(default_factory=list)
    """First uses in which the host waits for other hosts."""

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.member.rank

    def event(self) -> Event | None:
        """The event at which it is; None at the end."""
        events = self.member.events
        return events[self.position] if self.position < len(events) else None

    def load(self, part: str) -> float:
        """Work of a part of the model in the present micro-batch, relative to the trace's."""
        micro_batch, loads = self.mark.micro_batch, self.member.loads
        if micro_batch is None or not loads:
            return 1.0
        row = loads[micro_batch % len(loads)]
        return row.get(part, row.get("language_model", 1.0))
