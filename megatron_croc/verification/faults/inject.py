"""Run one of the project's commands with injected faults.

    python -m megatron_croc.verification.faults.inject \
        '[{"fault": "kill", "rank": 1, "iteration": 3}]' \
        megatron_croc.cli.main train --recipe tiny/pretrain_croc ...

Training has no code for this: faults are patched in at heartbeats, at the loss and where a
micro-batch is moved to the device. A fault with a `marker` file happens once, also over restarts.
`trace` is a folder for the samples of every step and replica.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_croc.log import rank


@dataclass(kw_only=True)
class Fault:
    """One fault, and the place where it happens."""

    fault: str
    """kill | signal | stop | hang | hang_in_c | raise at a place; nan_loss | spike | nan_gradient
    in a step; bad_sample at every occurrence of a sample; kill_at_call at a call during a save;
    disk_full during a save; trace: no fault, only the trace."""

    rank: int = 0
    """The rank on which it happens."""

    iteration: int = 0
    """Step in which it happens; 0: every step."""

    phase: str = "forward"
    """Place: the beginning of the name of the heartbeat's phase."""

    micro_batch: int | None = None
    """Micro-batch of this rank; None: the first one that reaches the place."""

    number: int = 1
    """Number of the signal (signal), or of the call (kill_at_call)."""

    name: str = ""
    """Function, such as `os.replace` (kill_at_call), or sample (bad_sample)."""

    marker: str | None = None
    """File that is made when the fault happens, and prevents a second one; None: no limit."""

    trace: str | None = None
    """Folder for the trace of samples."""

    def strikes(self) -> bool:
        """Return True if the fault is due; a fault with a marker is due once over all restarts."""
        from megatron_croc.training.safety.heartbeat import own_beat

        if rank() != self.rank or self.iteration not in (0, own_beat().iteration):
            return False
        if self.marker is None:
            return True
        try:
            Path(self.marker).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def inject(fault: Fault) -> None:
    """Patch this process so that the fault will happen."""
    if fault.trace is not None:
        _trace(Path(fault.trace))
    installers = {
        "nan_loss": _spoil_loss,
        "spike": _spoil_loss,
        "nan_gradient": _spoil_gradient,
        "bad_sample": _spoil_sample,
        "kill_at_call": _kill_at_call,
        "disk_full": _fill_disk,
        "trace": lambda fault: None,
    }
    installers.get(fault.fault, _strike_at_place)(fault)


def on_enter(act: Callable[[str, int | None], None]) -> None:
    """Call `act(phase, micro_batch)` after every heartbeat."""
    from megatron_croc.training import build, loop, step
    from megatron_croc.training.safety import heartbeat

    before = loop.enter

    def enter(phase: str, *, micro_batch: int | None = None, **more: Any) -> None:
        before(phase, micro_batch=micro_batch, **more)
        act(phase, micro_batch)

    for module in (build, heartbeat, loop, step):
        module.enter = enter  # type: ignore[attr-defined]


def _strike_at_place(fault: Fault) -> None:
    def act(phase: str, micro_batch: int | None) -> None:
        is_here = phase.startswith(fault.phase) and fault.micro_batch in (None, micro_batch)
        if is_here and fault.strikes():
            _strike(fault)

    on_enter(act)


def _strike(fault: Fault) -> None:
    if fault.fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.fault == "signal":
        os.kill(os.getpid(), fault.number)
    elif fault.fault == "hang":
        time.sleep(10_000)
    elif fault.fault == "hang_in_c":
        ctypes.PyDLL(None).sleep(10_000)  # PyDLL keeps the GIL: no Python thread runs any more
    elif fault.fault == "raise":
        raise RuntimeError("a made-up error of the device")
    else:
        raise ValueError(f"unknown fault {fault.fault}")


def _spoil_loss(fault: Fault) -> None:
    from megatron_croc.training import step

    factor = float("nan") if fault.fault == "nan_loss" else 1e3
    before = step._loss

    def loss(*args: Any, totals: Any, **kwargs: Any) -> Any:
        value, count, parts = before(*args, totals=totals, **kwargs)
        if fault.micro_batch in (None, totals.last_started) and fault.strikes():
            value = value * factor
            parts = {name: part * factor for name, part in parts.items()}
        return value, count, parts

    step._loss = loss  # type: ignore[assignment]


def _spoil_gradient(fault: Fault) -> None:
    from megatron_croc.training.step import TrainStep

    chunks: list[Any] = []
    before = TrainStep.forward_backward

    def forward_backward(self: TrainStep, *args: Any, **kwargs: Any) -> Any:
        chunks[:] = self.chunks
        return before(self, *args, **kwargs)

    def act(phase: str, micro_batch: int | None) -> None:
        if phase.startswith("summing gradients") and fault.strikes():
            chunks[0].buffers[0].grad_data.fill_(float("nan"))

    TrainStep.forward_backward = forward_backward  # type: ignore[method-assign]
    on_enter(act)


def _spoil_sample(fault: Fault) -> None:
    """Make one sample's pixels NaN, every time it is read."""
    from megatron_croc.training import step

    before = step.to_model_inputs

    def to_model_inputs(batch: Any, cp: Any) -> Any:
        inputs = before(batch, cp)
        if fault.name in batch.sample_ids and inputs.pixel_values is not None:
            inputs = replace(inputs, pixel_values=inputs.pixel_values.float() * float("nan"))
        return inputs

    step.to_model_inputs = to_model_inputs


def _kill_at_call(fault: Fault) -> None:
    """SIGKILL when a function is called for the `number`-th time within a save."""
    from megatron_croc.training.safety.heartbeat import own_beat

    module_name, _, name = fault.name.rpartition(".")
    module = importlib.import_module(module_name)
    before = getattr(module, name)
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if own_beat().phase.startswith("saving"):
            calls += 1
            if calls >= fault.number and fault.strikes():
                os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)

    setattr(module, name, called)


def _fill_disk(fault: Fault) -> None:
    """Limit files to 4 KiB while a checkpoint is written."""

    def act(phase: str, _: int | None) -> None:
        is_full = phase.startswith("saving") and fault.strikes()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if is_full else hard, hard))

    if rank() == fault.rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        on_enter(act)


def _trace(folder: Path) -> None:
    from megatron_croc.training.safety.heartbeat import own_beat
    from megatron_croc.training.step import TrainStep

    folder.mkdir(parents=True, exist_ok=True)
    before = TrainStep.train

    def train(self: TrainStep, batches: Any, *args: Any, **kwargs: Any) -> Any:
        metrics = before(self, batches, *args, **kwargs)
        if self.pg.mp.rank() == 0 and self.pg.cp.rank() == 0:
            samples = [sample for batch in batches for sample in batch.sample_ids]
            row = {"iteration": own_beat().iteration, "samples": samples, "time": time.time()}
            with (folder / f"rank_{rank()}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        return metrics

    TrainStep.train = train  # type: ignore[method-assign]


def run_command(name: str, words: Sequence[str]) -> int:
    """Run one of the project's commands in this process; returns its exit status.

    It is looked up by the name of its module: no room below `cli` imports the commands.
    """
    return importlib.import_module(name).main(words)


def main() -> int:
    """Inject the faults, then run the command."""
    faults, command, *words = sys.argv[1:]
    sys.argv[1:] = words
    from megatron_croc.parallel import device  # noqa: F401  before megatron is imported

    for fault in json.loads(faults):
        inject(Fault(**fault))
    return run_command(command, words)


if __name__ == "__main__":
    sys.exit(main())
