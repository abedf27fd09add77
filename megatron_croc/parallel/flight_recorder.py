"""Last pending collective, from torch's flight recorder, if torch has one."""

import json
from collections.abc import Callable
from typing import Any

from torch._C import _distributed_c10d as distributed_c10d  # type: ignore[attr-defined]

_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""Functions that return a record: NCCL's, in builds with NCCL; gloo's, from torch 2.8 on."""


def last_collective() -> str | None:
    """Return name and group of the last recorded collective that did not complete.

    Collectives of NCCL come first, because gloo is only used for small objects beside it. Of those
    a running one (known with TORCH_NCCL_ENABLE_TIMING) comes before queued ones.
    """
    for name in _DUMPS:
        pending = [e for e in _entries(getattr(distributed_c10d, name, None)) if _is_pending(e)]
        running = [entry for entry in pending if entry.get("state") == "started"]
        for entry in (running or pending)[-1:]:
            return f"{entry.get('profiling_name')} over group {entry.get('process_group')}"
    return None


def _entries(dump: Callable[[], bytes] | None) -> list[dict[str, Any]]:
    if dump is None:
        return []
    try:
        return json.loads(dump()).get("entries", [])
    except (RuntimeError, ValueError):
        return []


def _is_pending(entry: dict[str, Any]) -> bool:
    return entry.get("state") != "completed"
