"""Who waits for whom when nothing can go on: the circle, with the call and place of each rank."""

from collections.abc import Iterator

from megatron_croc.rehearsal.replay.hosts import Host
from megatron_croc.rehearsal.replay.nodes import Node
from megatron_croc.rehearsal.replay.simulation import Simulation

MOST_NAMED = 6
"""Most ranks of a chain that a message names."""


def find_deadlock(simulation: Simulation) -> str | None:
    """Describe the ranks that can never go on; None if all have reached the end of their work."""
    stuck = sorted({rank for rank, _ in _open_waits(simulation)})
    if not stuck:
        return None
    chain = _chain(simulation, stuck[0])
    parts = [_state(simulation, rank) for rank in chain[:MOST_NAMED]]
    if len(chain) > MOST_NAMED:
        parts.append(f"and so on over {len(chain) - MOST_NAMED} more ranks")
    return (
        f"deadlock: {len(stuck)} of {len(simulation.hosts)} simulated ranks can never go on; "
        + "; ".join(parts)
    )


def _open_waits(simulation: Simulation) -> Iterator[tuple[int, list[int]]]:
    """(rank, ranks for which it waits) of every wait that is not over."""
    for host in simulation.hosts.values():
        for use in host.comes_to:
            yield host.rank, use.absent()
        for node in _roots(_unfinished(host)):
            yield host.rank, _absent(simulation, node)


def _unfinished(host: Host) -> list[Node]:
    nodes = [*host.waits_for, *(n for tail in host.tails.values() for n in tail)]
    nodes += [*host.works.values(), *host.channels.values()]
    return [node for node in nodes if node.end is None]


def _roots(nodes: list[Node]) -> list[Node]:
    """Nodes that are ready and wait for other ranks, behind which the given ones stand."""
    roots, seen = [], set()
    while nodes:
        node = nodes.pop()
        if node in seen or node.end is not None:
            continue
        seen.add(node)
        if node.left == 0:
            roots.append(node)
        nodes.extend(node.before)
    return roots


def _absent(simulation: Simulation, node: Node) -> list[int]:
    if node.meeting is not None:
        return node.meeting.absent()
    return simulation.exchanges.absent(node)


def _waits(simulation: Simulation, rank: int) -> list[int]:
    """Ranks for which a rank waits; what stops its host comes first."""
    host = simulation.hosts[rank]
    found: list[int] = [other for use in host.comes_to for other in use.absent()]
    nodes = _roots(list(host.waits_for)) or _roots(_unfinished(host))
    for node in sorted(nodes, key=lambda node: node.label.name):
        found += _absent(simulation, node)
    return found


def _chain(simulation: Simulation, rank: int) -> list[int]:
    """Ranks that wait for the next; from the first of the circle, if there is one."""
    chain: list[int] = []
    while rank not in chain:
        chain.append(rank)
        others = _waits(simulation, rank)
        if not others:
            return chain
        rank = next((other for other in others if other in chain), others[0])
    return chain[chain.index(rank) :]


def _state(simulation: Simulation, rank: int) -> str:
    """One rank's wait in words."""
    host = simulation.hosts[rank]
    alike = f" (and {host.member.stands_for - 1} alike)" if host.member.stands_for > 1 else ""
    who = f"rank {rank}{alike}"
    if host.comes_to:
        use = host.comes_to[0]
        return f"{who} waits in {_at(*host.why)} for rank {use.absent()[0]}"
    roots = _roots(list(host.waits_for)) or _roots(_unfinished(host))
    held = f"{who} waits in {_at(*host.why)}" if host.waits_for else f"{who} has ended its step"
    if not roots:
        return f"{held}, with nothing left to do"
    node = min(roots, key=lambda node: node.label.name)
    others = _absent(simulation, node)
    verb = "for" if host.waits_for else "but still waits for"
    if host.waits_for and host.why[0].endswith(node.label.name) and len(roots) == 1:
        return f"{held} for rank {others[0]}"
    return f"{held}, {verb} its {_at(node.label.name, node.label.place)} with rank {others[0]}"


def _at(name: str, place: str) -> str:
    return f"{name} at {place}" if place else name
