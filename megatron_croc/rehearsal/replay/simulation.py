"""All simulated ranks, event by event.

Each host goes through its events and queues work, until it has to wait for work that is not done or
for another host; then another host goes on. If none can, the rest is a deadlock.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_croc.rehearsal.replay.communication import Communication
from megatron_croc.rehearsal.replay.costs import Costs
from megatron_croc.rehearsal.replay.hosts import Communicator, Host
from megatron_croc.rehearsal.replay.nodes import Board, Exchanges, Label, Node
from megatron_croc.rehearsal.replay.programs import Job
from megatron_croc.rehearsal.replay.rules import Rules
from megatron_croc.rehearsal.trace import (
    Collective,
    Compute,
    Exchange,
    HostRead,
    Mark,
    Memory,
    RecordEvent,
    Release,
    Synchronize,
    Wait,
    WaitEvent,
)

COMPUTE = "compute"
"""Lane of kernels."""


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory of one rank at one moment of its device."""

    rank: int
    time: float
    allocated: int
    peak: int


class Simulation:
    """All ranks of a job; `run` takes them as far as they get."""

    def __init__(self, job: Job, costs: Costs, rules: Rules) -> None:
        """Prepare the hosts; groups on which ranks do not agree are faults."""
        self.job, self.costs, self.rules = job, costs, rules
        self.hosts = {rank: Host(member) for rank, member in job.members.items()}
        self.board = Board(self._record)
        self.exchanges = Exchanges(self.board, buffers_sends=rules.buffers_sends)
        self.communication = Communication(job.header, self.hosts, costs)
        self.done: list[Node] = []
        """Kernels and communication that are done."""

        self.memory: list[MemorySample] = []
        self._runnable = deque(self.hosts.values())
        self._handlers: dict[type[Any], Callable[[Host, Any], bool]] = {
            Compute: self._compute,
            Collective: self._collective,
            Exchange: self._exchange,
            Wait: self._wait,
            RecordEvent: self._record_event,
            WaitEvent: self._wait_event,
            Synchronize: self._synchronize,
            HostRead: self._host_read,
            Memory: self._memory,
            Release: self._release,
            Mark: self._mark,
        }

    def run(self) -> None:
        """Take all hosts to their end, or to where none can go on."""
        while self._runnable:
            host = self._runnable.popleft()
            while (event := host.event()) is not None:
                if not self._handlers[type(event)](host, event):
                    break
                host.position += 1

    # Handlers of events. One that returns False has stopped its host, and moved `position` itself
    # if the host is to go on behind the event.

    def _compute(self, host: Host, event: Compute) -> bool:
        begin = host.now
        host.now += self.costs.launch * event.kernels
        seconds = (event.seconds or 0.0) * host.load(event.part)
        work = partial(self._run_alone, seconds, host.now)
        label = self._label(host, event.operation or event.part, event.place)
        node = Node(host.rank, label, work)
        before = host.tails.get(event.stream, ())
        host.tails[event.stream] = [node]
        self.board.submit(node, before, not_before=begin)
        return self._host_computes(host, node, "compute", event.place)

    def _run_alone(self, seconds: float, launched: float, node: Node) -> None:
        """Run kernels: no sooner done than the last of them is launched."""
        node.busy = seconds
        self.board.finish(node, max(node.ready + seconds, launched))

    def _collective(self, host: Host, event: Collective) -> bool:
        group = self.communication.group(host, event.group)
        key = (group.name, group.ranks)
        if not (group.is_ready or self._meets(host, [key], event.place)):
            return False
        name = f"{event.kind} {host.calls[key]} of {group.name}"
        meeting = self.communication.collective(host, event, key)
        label = self._label(host, name, event.place, key)
        node = Node(host.rank, label, partial(meeting.arrive, self.board))
        node.meeting = meeting
        return self._communicate(host, node, event, key)

    def _exchange(self, host: Host, event: Exchange) -> bool:
        group = self.communication.group(host, event.group)
        peers = [host.member.peer(transfer.peer) for transfer in event.transfers]
        pairs = sorted({(min(host.rank, peer), max(host.rank, peer)) for peer in peers})
        key: Communicator = (group.name, group.ranks)
        uses: list[Communicator] = [(f"{group.name}, the pair", pair) for pair in pairs]
        if not event.batched:
            key = uses[0]
        elif not (group.is_ready or self._meets(host, [key], event.place)):
            return False
        if not (group.is_ready or self._meets(host, uses, event.place)):
            return False
        names = [
            f"{transfer.direction} {'to' if transfer.direction == 'send' else 'from'} rank {peer}"
            for transfer, peer in zip(event.transfers, peers, strict=True)
        ]
        label = self._label(host, f"{', '.join(names)} ({group.name})", event.place, key)
        node = Node(host.rank, label, self.exchanges.arrive)
        self.exchanges.messages[node] = [
            self.communication.message(host, node, transfer, key, event.place)
            for transfer in event.transfers
        ]
        for transfer, name in zip(event.transfers, names, strict=True):
            if transfer.storage is not None and event.work is not None:
                host.open_sends[transfer.storage] = event.work, f"{name} at {event.place or '?'}"
        return self._communicate(host, node, event, key)

    def _communicate(
        self, host: Host, node: Node, event: Collective | Exchange, key: Communicator
    ) -> bool:
        """Queue communication; without a handle its stream waits for it."""
        host.now += self.costs.launch
        before = list(host.tails.get(event.stream, ()))
        if self.rules.orders_communicator and key in host.channels:
            before.append(host.channels[key])
        host.channels[key] = node
        if event.work is not None:
            host.works[event.work] = node
        else:
            host.tails[event.stream] = [node]
        self.board.submit(node, before, not_before=host.now)
        if event.work is not None:
            return True
        return self._host_computes(host, node, node.label.name, event.place)

    def _wait(self, host: Host, event: Wait) -> bool:
        node = host.works.get(event.work)
        if node is None:
            self.communication.fault(
                ("work", host.rank),
                f"rank {host.rank} waits at {event.place or '?'} for work {event.work}, which it "
                "has not begun",
            )
            return True
        for storage in [s for s, (work, _) in host.open_sends.items() if work == event.work]:
            del host.open_sends[storage]
        host.tails.setdefault(event.stream, []).append(node)
        return self._host_computes(host, node, f"wait for {node.label.name}", event.place)

    def _record_event(self, host: Host, event: RecordEvent) -> bool:
        host.recorded[event.number] = list(host.tails.get(event.stream, ()))
        return True

    def _wait_event(self, host: Host, event: WaitEvent) -> bool:
        host.tails.setdefault(event.stream, []).extend(host.recorded.get(event.number, ()))
        return True

    def _synchronize(self, host: Host, event: Synchronize) -> bool:
        name = "synchronize"
        if event.work is not None:
            nodes = [host.works[event.work]] if event.work in host.works else []
        elif event.recorded is not None:
            nodes = host.recorded.get(event.recorded, [])
        elif event.stream is not None:
            nodes = host.tails.get(event.stream, [])
        else:
            name = "synchronize (the whole device)"
            nodes = [node for tail in host.tails.values() for node in tail]
            nodes += [*host.channels.values(), *host.works.values()]
            host.open_sends.clear()
        return self._host_waits(host, nodes, name, event.place)

    def _host_read(self, host: Host, event: HostRead) -> bool:
        nodes = host.tails.get(event.stream, [])
        return self._host_waits(host, nodes, event.operation or "a read of the device", event.place)

    def _memory(self, host: Host, event: Memory) -> bool:
        node = Node(host.rank, Label(name="memory"), partial(self._sample, event))
        self.board.submit(node, host.tails.get(0, ()), not_before=host.now)
        return True

    def _sample(self, event: Memory, node: Node) -> None:
        self.memory.append(MemorySample(node.rank, node.ready, event.allocated, event.peak))
        self.board.finish(node, node.ready)

    def _release(self, host: Host, event: Release) -> bool:
        if event.storage in host.open_sends:
            _, send = host.open_sends.pop(event.storage)
            self.communication.fault(
                ("open send", event.place),
                f"rank {host.rank} frees memory at {event.place or '?'} while a send may still "
                f"read it ({send}); wait for the send first, or keep the tensor until then",
            )
        return True

    def _mark(self, host: Host, event: Mark) -> bool:
        host.mark = event
        return True

    # Waits of hosts

    def _meets(self, host: Host, keys: Sequence[Communicator], place: str) -> bool:
        if not self.rules.meets_at_first_use:
            return True
        return self.communication.meets(host, keys, place, self._runnable.append)

    def _host_computes(self, host: Host, node: Node, name: str, place: str) -> bool:
        return not self.rules.host_computes or self._host_waits(host, [node], name, place)

    def _host_waits(self, host: Host, nodes: Sequence[Node], name: str, place: str) -> bool:
        """Hold the host until nodes are done; then it goes on behind this event."""
        unfinished = []
        for node in nodes:
            if node.end is None:
                unfinished.append(node)
            elif node.end > host.now:
                host.now = node.end
        if not unfinished:
            return True
        host.waits_for, host.why = unfinished, (name, place)
        host.position += 1
        gate = Node(host.rank, Label(name=name, place=place), partial(self._go_on, host))
        self.board.submit(gate, unfinished, not_before=host.now)
        return False

    def _go_on(self, host: Host, gate: Node) -> None:
        host.now, host.waits_for = gate.ready, []
        self._runnable.append(host)

    # Helpers

    def _label(
        self, host: Host, name: str, place: str, communicator: Communicator | None = None
    ) -> Label:
        mark = host.mark
        return Label(
            name=name,
            place=place,
            lane=COMPUTE if communicator is None else communicator[0].partition(",")[0],
            axes=() if communicator is None else self.communication.axes(communicator),
            phase=mark.phase,
            micro_batch=mark.micro_batch,
            direction=mark.direction,
            chunk=mark.chunk,
        )

    def _record(self, node: Node) -> None:
        if node.label.lane:
            self.done.append(node)
