"""Environment variables that change what a GPU computes, or what is known after a hang."""

import os
from collections.abc import Iterator

from megatron_croc.cli.doctor.finding import Finding

FLIGHT_RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Collectives that torch's flight recorder keeps; the second name is the older one."""

TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables that allow TF32 for float32 products, if 1: in cuBLAS in spite of torch; in torch."""


def look_at_environment() -> Iterator[Finding]:
    """Check the variables of this process; examples/launch/environment.sh sets them."""
    yield _tf32()
    yield _flight_recorder()


def _tf32() -> Finding:
    allowed = [name for name in TF32 if os.environ.get(name) == "1"]
    if not allowed:
        return Finding("ok", "TF32", "not forced by the environment")
    return Finding(
        "warning",
        "TF32",
        f"{' and '.join(allowed)}=1: float32 products keep 10 bits, which changes 3 to 7 % of the "
        "token assignments",
        f"export {' '.join(f'{name}=0' for name in allowed)}",
    )


def _flight_recorder() -> Finding:
    size = next((os.environ[name] for name in FLIGHT_RECORDER if name in os.environ), None)
    if size is not None and size.isdigit() and int(size) > 0:
        return Finding("ok", "flight recorder", f"keeps {size} collectives")
    return Finding(
        "warning",
        "flight recorder",
        "not turned on" if size is None else f"off (size {size})",
        f"export {FLIGHT_RECORDER[0]}=2000 {FLIGHT_RECORDER[1]}=2000: a run that hangs then says "
        "in which collective",
    )
