"""What torch's flight recorder knows about the collective that failed, where torch has one."""

import json
from collections.abc import Callable
from typing import Any

from torch._C import _distributed_c10d as distributed_c10d  # type: ignore[attr-defined]

_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""NCCL's recorder, in builds with NCCL; gloo's, from torch 2.8 on."""


def last_collective() -> str | None:
    """The last recorded collective that did not complete: its name and group.

    NCCL's are preferred, as gloo only carries small objects beside it; and of those one that is
    running (known with TORCH_NCCL_ENABLE_TIMING) over ones that are queued behind it.
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
