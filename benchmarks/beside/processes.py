"""The two processes of a comparison, seen from the script that asks them for steps."""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from beside.case import Peer, Size

ROOT = Path(__file__).parents[2]


class Worker:
    """One process that takes training steps; `peak_mib` of a reply is its own peak memory."""

    def __init__(self, python: str, module: str, order: dict[str, Any]) -> None:
        """Start it and wait until its model is built."""
        self.name = module
        path = str(ROOT) if module == "beside.ours" else ""
        self.process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT / "benchmarks",
            env={
                **os.environ,
                "PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}",
                **({"CUDA_VISIBLE_DEVICES": ""} if order["device"] == "cpu" else {}),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self.ask(order)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one line, wait for one line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last line is read below
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            sys.exit(f"error: {self.name} ended with status {status}; its last lines are above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Pair(NamedTuple):
    """The released code and ours, from the same weights."""

    released: Worker
    ours: Worker
    control: Worker | None
    """The released code again, from weights that differ in the last bits."""


@contextmanager
def start_pair(
    peer: Peer,
    size: Size,
    folder: Path,
    python: str,
    *,
    num_batches: int,
    learning_rate: float,
    device: str = "cpu",
    dtype: str = "fp32",
    with_control: bool = False,
) -> Iterator[Pair]:
    """Start the released code's process, then ours with the weights that it saved."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as started:

        def start(python: str, module: str, **more: object) -> Worker:
            worker = Worker(python, module, {**order, **more})
            started.callback(worker.close)
            return worker

        order = {
            "size": size.to_json(),
            "peer": peer,
            "folder": str(folder.resolve()),
            "scratch": scratch,
            "weights": f"{scratch}/weights.safetensors",
            "num_batches": num_batches,
            "learning_rate": learning_rate,
            "device": device,
            "dtype": dtype,
        }
        released = start(python, "beside.peer")
        ours = start(sys.executable, "beside.ours")
        control = start(python, "beside.peer", nudge=True) if with_control else None
        yield Pair(released, ours, control)


def add_peer_options(parser: ArgumentParser) -> None:
    """Folders of the released code, and the interpreters that can import it."""
    parser.add_argument("--peer-croc", type=Path, help="checkout of deepglint/Croc")
    parser.add_argument("--peer-victor", type=Path, help="checkout of deepglint/Victor")
    parser.add_argument("--python-croc", help="interpreter with transformers 4.37.2")
    parser.add_argument("--python-victor", help="interpreter with transformers 4.53.1")


def chosen_peers(parser: ArgumentParser, options: Namespace) -> dict[Peer, tuple[Path, str]]:
    """Folder and interpreter of every released project that the command names."""
    peers: dict[Peer, tuple[Path, str]] = {}
    names: tuple[Peer, ...] = ("croc", "victor")
    packages = {"croc": "croc", "victor": "llava"}
    for peer in names:
        folder = getattr(options, f"peer_{peer}")
        if folder is None:
            continue
        if not (folder / packages[peer] / "model").is_dir():
            parser.error(f"--peer-{peer} {folder}: no folder {packages[peer]}/model in it")
        peers[peer] = folder, getattr(options, f"python_{peer}") or sys.executable
    if not peers:
        parser.error("name the released code: --peer-croc FOLDER, --peer-victor FOLDER, or both")
    return peers
