"""Names of parallel layouts: tp2+sp+pp2."""

import math
from dataclasses import dataclass, field
from itertools import product

from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError

_WORDS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes."""

    name: str
    sizes: dict[str, int] = field(default_factory=dict)
    sequence_parallel: bool = False

    @classmethod
    def parse(cls, name: str) -> "Layout":
        """Read `tp2+sp+pp2`: a size for tp, pp, vpp, cp, dp, and sp alone."""
        sizes: dict[str, int] = {}
        sequence_parallel = False
        for word in name.split("+"):
            axis, digits = word.rstrip("0123456789"), word.lstrip("abcdefghijklmnopqrstuvwxyz")
            if word == "sp":
                sequence_parallel = True
            elif axis in (*_WORDS, "dp") and digits.isdigit():
                sizes[axis] = int(digits)
            else:
                raise ConfigError(
                    f"layout {name}: {word} is not tpN, sp, ppN, vppN, cpN or dpN, joined by +"
                )
        return cls(name=name, sizes=sizes, sequence_parallel=sequence_parallel)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return math.prod(self.sizes.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))

    def apply(self, run: RunConfig) -> RunConfig:
        """Set this layout in `run`, and return it."""
        for axis, setting in _WORDS.items():
            default = None if axis == "vpp" else 1
            setattr(run.parallel, setting, self.sizes.get(axis, default))
        run.parallel.sequence_parallel = self.sequence_parallel
        return run


def every_layout(world_size: int) -> list[Layout]:
    """All combinations of TP, SP, PP, VPP, CP and DP of size 1 and 2 on up to `world_size`."""
    layouts = []
    for tp, sp, pp, vpp, cp, dp in product((1, 2), (0, 1), (1, 2), (1, 2), (1, 2), (1, 2)):
        if (sp and tp == 1) or (vpp > 1 and pp == 1) or tp * pp * cp * dp > world_size:
            continue
        sizes = {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "dp": dp}
        words = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
        if sp:
            words.insert(1, "sp")
        if words:
            layouts.append(Layout.parse("+".join(words)))
    return layouts
