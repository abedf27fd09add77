"""Places in the code, as the report names them."""

import sys
from types import FrameType

_PASSED_OVER = ("/torch/", "/megatron_croc/rehearsal/", "contextlib.py", "functools.py")
_PASSED_OVER += ("/parallel/collectives.py",)  # its callers are meant


def _short(path: str) -> str:
    for root in ("megatron_croc", "megatron"):
        if f"/{root}/" in path:
            return f"{root}/{path.rsplit(f'/{root}/', 1)[1]}"
    return path.rpartition("/")[2]


def place() -> str:
    """`file:line` of the first caller outside torch and the rehearsal, then the one in our code.

    For example `megatron/core/utils.py:1205 < megatron_croc/training/optimizer.py:120`.
    """
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not any(part in path for part in _PASSED_OVER):
            name = _short(path)
            if not found or not name.startswith("megatron/"):
                found.append(f"{name}:{frame.f_lineno}")
            if not name.startswith("megatron/"):
                break
        frame = frame.f_back
    return " < ".join(found) or "?"


def blame(error: BaseException) -> str:
    """First line of an error with the innermost place of our code, or of megatron's, in it."""
    found = "?"
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if not any(part in path for part in _PASSED_OVER) and "megatron" in path:
            found = f"{_short(path)}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text} at {found}"
