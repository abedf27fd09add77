"""Hand-made traces of small jobs, for tests of the replay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_croc.rehearsal.replay.replay import Replay, replay
from megatron_croc.rehearsal.trace import (
    Compute,
    Event,
    Exchange,
    Group,
    Header,
    Mark,
    Trace,
    Transfer,
    Wait,
)


@dataclass(frozen=True)
class FixedCosts:
    """Costs by hand: every collective and every message takes the same time."""

    each_collective: float = 0.0
    each_transfer: float = 0.0
    launch: float = 0.0
    connect: float = 0.0
    source: str = "made up"

    def compute(self, work: Compute) -> float:
        """One second per operation."""
        return work.flops

    def collective(self, kind: str, num_bytes: float, ranks: Sequence[int]) -> float:
        """The same for all."""
        return self.each_collective

    def transfer(self, num_bytes: float, sender: int, receiver: int) -> float:
        """The same for all."""
        return self.each_transfer


def make_traces(
    events: Mapping[int, Sequence[Event]],
    *,
    groups: Mapping[str, Sequence[Sequence[int]]],
    backend: str = "nccl",
    stands_for: Mapping[int, Sequence[int]] | None = None,
    ready: bool = False,
    **sizes: int,
) -> list[Trace]:
    """Traces of some ranks.

    Args:
        events: rank -> its events.
        groups: name -> the groups of that name.
        backend: nccl or gloo.
        stands_for: rank -> ranks of its class; left out: itself.
        ready: all communicators were made before the trace begins.
        sizes: sizes of the axes, 1 where left out.
    """
    axes = {"tp": 1, "cp": 1, "dp": 1, "pp": 1, **sizes}
    world = axes["tp"] * axes["cp"] * axes["dp"] * axes["pp"]
    return [
        Trace(
            Header(
                rank=rank,
                world_size=world,
                sizes=axes,
                backend=backend,
                groups=tuple(
                    Group(name=name, ranks=tuple(ranks), is_ready=ready)
                    for name, lists in groups.items()
                    for ranks in lists
                    if rank in ranks
                ),
                stands_for=tuple((stands_for or {}).get(rank, ())),
            ),
            tuple(its),
        )
        for rank, its in events.items()
    ]


def run_traces(
    events: Mapping[int, Sequence[Event]],
    *,
    costs: FixedCosts | None = None,
    groups: Mapping[str, Sequence[Sequence[int]]],
    backend: str = "nccl",
    ready: bool = False,
    **sizes: int,
) -> Replay:
    """Replay hand-made traces of all ranks."""
    traces = make_traces(events, groups=groups, backend=backend, ready=ready, **sizes)
    return replay(traces, costs or FixedCosts())


def send(peer: int, *, group: str = "pp", size: int = 4, place: str = "", **more: int) -> Exchange:
    """A batched send; blocking for its stream unless `work` is given."""
    return _one("send", peer, group, size, place, batched=True, **more)


def receive(
    peer: int, *, group: str = "pp", size: int = 4, place: str = "", **more: int
) -> Exchange:
    """A batched receive."""
    return _one("receive", peer, group, size, place, batched=True, **more)


def unbatched(exchange: Exchange) -> Exchange:
    """The same outside a batch."""
    from dataclasses import replace

    return replace(exchange, batched=False)


def _one(direction, peer, group, size, place, *, batched, work=None, storage=None) -> Exchange:
    transfer = Transfer(
        direction=direction, peer=peer, dtype="float32", bytes=size, storage=storage
    )
    return Exchange(group=group, transfers=(transfer,), batched=batched, work=work, place=place)


def one_forward_one_backward(
    stage: int, stages: int, micro_batches: int, *, forward: float, backward: float
) -> list[Event]:
    """Events of a stage in megatron's 1F1B schedule; rank = stage."""
    events: list[Event] = []

    def exchange(*transfers: Transfer) -> None:
        if transfers:
            number = len(events)
            events.append(Exchange(group="pp", transfers=transfers, work=number))
            events.append(Wait(work=number))

    def up(direction: str) -> list[Transfer]:
        return [Transfer(direction=direction, peer=stage - 1, bytes=8)] if stage else []  # type: ignore[arg-type]

    def down(direction: str) -> list[Transfer]:
        last = stage == stages - 1
        return [] if last else [Transfer(direction=direction, peer=stage + 1, bytes=8)]  # type: ignore[arg-type]

    def run(seconds: float, number: int, direction: str) -> None:
        events.append(Mark(phase="step", micro_batch=number, direction=direction))  # type: ignore[arg-type]
        events.append(Compute(operation=direction, flops=seconds, part="language_model"))

    warm = min(stages - stage - 1, micro_batches)
    for number in range(warm):
        exchange(*up("receive"))
        run(forward, number, "forward")
        exchange(*down("send"))
    steady = micro_batches - warm
    if steady:
        exchange(*up("receive"))
    for number in range(steady):
        run(forward, warm + number, "forward")
        exchange(*down("send"), *down("receive"))
        run(backward, number, "backward")
        if number == steady - 1:
            exchange(*up("send"))
        else:
            exchange(*up("send"), *up("receive"))
    for number in range(steady, micro_batches):
        exchange(*down("receive"))
        run(backward, number, "backward")
        exchange(*up("send"))
    return events
