"""Checks of logging, metrics and profiling."""

import importlib.util
import socket
from collections.abc import Iterator

from megatron_croc.config.run import RunConfig
from megatron_croc.log import rank


def find_logging_faults(run: RunConfig, world_size: int, *, for_training: bool) -> Iterator[str]:
    """Find the faults of `logging`, one line each.

    Args:
        run: the run.
        world_size: number of processes.
        for_training: also check that packages are installed and the port is free.
    """
    log = run.logging
    if not 0 <= log.timing_log_level <= 2:
        yield f"timing_log_level={log.timing_log_level}: must be 0, 1 or 2"
    if log.straggler_percent <= 0:
        yield f"straggler_percent={log.straggler_percent}: must be positive"
    if not 0 <= log.prometheus_port <= 65535:
        yield f"prometheus_port={log.prometheus_port}: a port is at most 65535; 0 turns it off"
    elif log.prometheus_port and for_training:
        yield from _port_faults(log.prometheus_port)
    if log.wandb_exp_name is not None and log.wandb_project is None:
        yield f"wandb_exp_name={log.wandb_exp_name}: names nothing without wandb_project"
    if log.wandb_project is not None and for_training and not _is_installed("wandb"):
        yield (
            f"wandb_project={log.wandb_project}: wandb is not installed: "
            "pip install -e '.[wandb]', or unset the project"
        )
    if not (log.profile or log.record_memory_history):
        return
    if not 1 <= log.profile_step_start < log.profile_step_end:
        yield (
            f"profile_step_start={log.profile_step_start}: must be at least 1 and below "
            f"profile_step_end={log.profile_step_end}"
        )
    for number in log.profile_ranks:
        if not 0 <= number < world_size:
            yield f"profile_ranks={number}: ranks are 0 to {world_size - 1}"
    if run.log_folder is None:
        yield "profile and record_memory_history need a folder: give log_dir or save"


def _port_faults(port: int) -> Iterator[str]:
    if not _is_installed("prometheus_client"):
        yield (
            f"prometheus_port={port}: prometheus-client is not installed: "
            "pip install -e '.[prometheus]', or set the port to 0"
        )
    if rank() != 0:
        return  # only rank 0 opens the port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield f"prometheus_port={port}: {error.strerror}; choose another port, or 0"


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder ./wandb has no origin
