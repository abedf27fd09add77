"""Classes of ranks: one rank of each is rehearsed and stands for the others.

Ranks of one pipeline stage do the same work, but for the first tensor-parallel and the first
context-parallel rank, which share the data with the others, and the first replica.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.rehearsal.trace import AXES


@dataclass(frozen=True, kw_only=True)
class RankClass:
    """Ranks that behave alike."""

    rank: int
    """Global rank that is rehearsed."""

    place: Mapping[str, int]
    """Its coordinates, by axis."""

    stands_for: tuple[int, ...]
    """Global ranks of the class, `rank` among them."""

    @property
    def name(self) -> str:
        """Text such as "pp 1 tp 1 cp 0 dp 0"."""
        return " ".join(f"{axis} {self.place[axis]}" for axis in ("pp", "tp", "cp", "dp"))


def axis_sizes(parallel: ParallelConfig, world_size: int) -> dict[str, int]:
    """Size of each axis."""
    return {
        "tp": parallel.tensor_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "dp": parallel.data_parallel_size(world_size),
        "pp": parallel.pipeline_model_parallel_size,
    }


def rank_classes(parallel: ParallelConfig, world_size: int) -> list[RankClass]:
    """Classes of a job, by pipeline stage; together they hold every rank once."""
    sizes = axis_sizes(parallel, world_size)
    members: dict[tuple[int, str], list[int]] = {}
    for rank in range(world_size):
        at = _coordinates(rank, sizes)
        others = [axis for axis in ("cp", "tp") if at[axis]]
        kind = "dp" if at["dp"] else " ".join(others)
        members.setdefault((at["pp"], kind), []).append(rank)
    classes: list[RankClass] = []
    for (_, kind), ranks in sorted(members.items(), key=lambda item: item[1][0]):
        # The last tensor-parallel rank, the one most unlike the first; else the first other one.
        rank = ranks[-1] if kind.endswith("tp") else ranks[0]
        place = _coordinates(rank, sizes)
        classes.append(RankClass(rank=rank, place=place, stands_for=tuple(ranks)))
    return classes


def _coordinates(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Coordinates of a rank in megatron's order, tp varying fastest."""
    found: dict[str, int] = {}
    for axis in AXES:
        rank, found[axis] = divmod(rank, sizes[axis])
    return found
