"""What torch's flight recorder knows about the collective that failed, where torch has one."""

import json

from torch._C import _distributed_c10d as distributed_c10d  # type: ignore[attr-defined]


def last_collective() -> str | None:
    """The last recorded collective that did not complete: its name, group and shape."""
    dump = getattr(distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return None
    try:
        entries = json.loads(dump()).get("entries", [])
    except (RuntimeError, ValueError):
        return None
    pending = [entry for entry in entries if entry.get("state") != "completed"]
    if not pending:
        return None
    entry = pending[-1]
    return f"{entry.get('profiling_name')} over group {entry.get('process_group')}"
