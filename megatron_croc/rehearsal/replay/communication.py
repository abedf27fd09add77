"""Communicators of all ranks: who belongs to them, first uses, and which calls meet."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_croc.errors import DataError
from megatron_croc.rehearsal.replay.costs import Costs
from megatron_croc.rehearsal.replay.hosts import Communicator, Host
from megatron_croc.rehearsal.replay.nodes import FirstUse, Meeting, Message, Node
from megatron_croc.rehearsal.trace import AXES, Collective, Group, Header, Transfer


class Communication:
    """Meetings of all simulated ranks; disagreements become faults."""

    def __init__(self, header: Header, hosts: Mapping[int, Host], costs: Costs) -> None:
        """No communicator has been used yet."""
        self.faults: dict[object, str] = {}
        """Kind of fault and where -> message; the first of each kind and place."""

        self._header, self._hosts, self._costs = header, hosts, costs
        self._meetings: dict[tuple[Communicator, int], Meeting] = {}
        self._messages: dict[tuple[Communicator, int, int], deque[Message]] = {}
        self._uses: dict[Communicator, FirstUse] = {}
        self._axes: dict[Communicator, tuple[str, ...]] = {}
        for host in hosts.values():
            for group in host.member.groups.values():
                self._check_group(host.rank, group)

    def fault(self, key: object, message: str) -> None:
        """Keep a fault, unless there is one with this key."""
        self.faults.setdefault(key, message)

    def group(self, host: Host, name: str) -> Group:
        """The group that a trace calls `name`."""
        group = host.member.groups.get(name)
        if group is None:
            raise DataError(
                f"the trace of rank {host.rank} uses group {name}, which its header lacks"
            )
        return group

    def axes(self, communicator: Communicator) -> tuple[str, ...]:
        """Axes along which the ranks of a communicator differ."""
        if communicator not in self._axes:
            found = [self._header.coordinates(rank) for rank in communicator[1]]
            axes = tuple(axis for axis in AXES if len({c[axis] for c in found}) > 1)
            self._axes[communicator] = axes
        return self._axes[communicator]

    def _check_group(self, rank: int, group: Group) -> None:
        for other in group.ranks:
            if other == rank or other not in self._hosts:
                continue
            theirs = self._hosts[other].member.groups.get(group.name)
            if theirs is None or theirs.ranks != group.ranks:
                self.fault(
                    ("group", group.name),
                    f"group {group.name}: rank {rank} has ranks {short(group.ranks)}, rank {other} "
                    f"has {short(theirs.ranks) if theirs else 'no such group'}; all its ranks must "
                    "make it from the same list",
                )

    def meets(
        self,
        host: Host,
        communicators: Iterable[Communicator],
        place: str,
        release: Callable[[Host], None],
    ) -> bool:
        """Come to the first use of communicators; return False if other hosts have not come.

        Args:
            host: the host that comes.
            communicators: all that its next call uses.
            place: place of this call.
            release: called for each host that can go on because this one has come.
        """
        communicators = list(communicators)
        waiting = []
        for communicator in communicators:
            name, ranks = communicator
            use = self._uses.get(communicator)
            if use is None:
                needed = frozenset(ranks) & self._hosts.keys()
                use = self._uses[communicator] = FirstUse(f"{name} of {short(ranks)}", needed)
            if not use.is_over and host.rank not in use.arrived:
                use.arrive(host.rank, host.now, place)
                if use.is_over:
                    for rank in use.needed - {host.rank}:
                        other = self._hosts[rank]
                        if other.comes_to and all(open_use.is_over for open_use in other.comes_to):
                            other.comes_to = []
                            release(other)
            if not use.is_over:
                waiting.append(use)
        if waiting:
            names = ", ".join(use.name for use in waiting)
            host.comes_to, host.why = waiting, (f"the first use of {names}", place)
            return False
        for communicator in communicators:
            use = self._uses[communicator]
            if use.arrived.pop(host.rank, None) is not None:
                host.now = max(host.now, use.time + self._costs.connect)
        return True

    def collective(self, host: Host, event: Collective, key: Communicator) -> Meeting:
        """The meeting of this rank's next collective in a group; differing calls are a fault."""
        number = host.calls[key]
        host.calls[key] += 1
        host.order.append(key)
        is_object = event.kind.endswith("_object")
        mine = event.kind, event.dtype, 0 if is_object else event.bytes
        meeting = self._meetings.get((key, number))
        if meeting is None:
            needed = frozenset(key[1]) & self._hosts.keys()
            meeting = Meeting(needed, signature=mine, first=(host.rank, event.place))
            self._meetings[key, number] = meeting
        elif meeting.signature != mine:
            calls = {meeting.first: meeting.signature, (host.rank, event.place): mine}
            (one, its), (other, theirs) = sorted(calls.items())
            self.fault(
                ("mismatch", key),
                f"{group_text(key)}, call {number}: rank {one[0]} calls {_call(its)} at "
                f"{one[1] or '?'}, rank {other[0]} {_call(theirs)} at {other[1] or '?'}; one of "
                "them leaves out a call before it, or their shapes differ",
            )
        load = 1.0 if "dp" in self.axes(key) else host.load("language_model")
        seconds = self._costs.collective(event.kind, event.bytes * load, key[1])
        meeting.seconds = max(meeting.seconds, seconds)
        meeting.calls += 1
        if meeting.calls == len(meeting.needed):
            del self._meetings[key, number]
        return meeting

    def message(
        self, host: Host, node: Node, transfer: Transfer, key: Communicator, place: str
    ) -> Message:
        """The message of this transfer; the other side may have called it already."""
        peer = host.member.peer(transfer.peer)
        ends = (host.rank, peer) if transfer.direction == "send" else (peer, host.rank)
        waiting = self._messages.setdefault((key, *ends), deque())
        if waiting and host.rank not in waiting[0].sides:
            message = waiting.popleft()
            if (message.dtype, message.num_bytes) != (transfer.dtype, transfer.bytes):
                there = (peer, message.dtype, message.num_bytes, message.place)
                here = (host.rank, transfer.dtype, transfer.bytes, place)
                sender, receiver = sorted((there, here), key=lambda side: side[0] != ends[0])
                self.fault(
                    ("mismatch", key),
                    f"{group_text(key)}: {_side('sends', *sender)}, "
                    f"{_side('receives', *receiver)}; both sides need the same shape and dtype",
                )
        else:
            seconds = self._costs.transfer(transfer.bytes * host.load("language_model"), *ends)
            message = Message(*ends, seconds, transfer.dtype, transfer.bytes, place)
            waiting.append(message)
        message.sides[host.rank] = node
        return message

    def find_other_orders(self) -> None:
        """Fault for each two groups whose collectives two ranks call in different orders.

        If they wait for each other this is a deadlock; on streams of their own they run only while
        the kernels of both fit the device at once.
        """
        keys = sorted({key for host in self._hosts.values() for key in host.calls})
        members = {key: frozenset(key[1]) & self._hosts.keys() for key in keys}
        shared = [key for key in keys if len(members[key]) > 1]
        for one, other in itertools.combinations(shared, 2):
            both = sorted(members[one] & members[other])
            if len(both) < 2:
                continue
            orders = [[k for k in self._hosts[rank].order if k in (one, other)] for rank in both]
            for rank, order in zip(both, orders, strict=True):
                if order != orders[0]:
                    self.fault(
                        ("order", one, other),
                        f"ranks {both[0]} and {rank} call collectives of groups {one[0]} and "
                        f"{other[0]} in different orders, and nothing makes one wait for the "
                        "other; NCCL may hang; call them in one order",
                    )

    def unreceived(self) -> list[Message]:
        """Messages of which one side has not called."""
        return [message for waiting in self._messages.values() for message in waiting]


def _call(signature: tuple[str, str, int]) -> str:
    kind, dtype, size = signature
    return f"{kind} of {_size(dtype, size)}"


def _size(dtype: str, num_bytes: int) -> str:
    return f"{num_bytes:,} bytes" + (f" ({dtype})" if dtype else "")


def _side(verb: str, rank: int, dtype: str, num_bytes: int, place: str) -> str:
    return f"rank {rank} {verb} {_size(dtype, num_bytes)} at {place or '?'}"


def group_text(key: Communicator) -> str:
    """A communicator in words."""
    return f"group {key[0]} of ranks {short(key[1])}"


def short(ranks: Sequence[int]) -> str:
    """The first ranks of a long list."""
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:4]))}, ... {ranks[-1]} ({len(ranks)} ranks)"
