"""Measured here, or over all ranks torchrun started: network, clocks, disk, data."""

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_croc.cli.doctor.finding import Finding
from megatron_croc.config.run import RunConfig
from megatron_croc.parallel import device

MAX_CLOCK_SKEW_S = 1.0
"""Clocks further apart make logs of nodes unreadable side by side."""

_MIB = 2**20


def look_at_network(sizes: tuple[int, ...] = (1 * _MIB, 64 * _MIB)) -> Iterator[Finding]:
    """All-reduce over all ranks: right, and how fast; software equal on all of them; clocks.

    Every rank calls it inside an initialised process group; findings are the same on all.

    Args:
        sizes: bytes of the all-reduced tensors.
    """
    world = dist.get_world_size()
    yield from _equal_software(world)
    for size in sizes:
        yield _all_reduce(size, world)
    yield _clock_skew()


def _equal_software(world: int) -> Iterator[Finding]:
    mine = {
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "python": platform.python_version(),
        "megatron_croc": _source_digest(),
    }
    everyone: list[dict[str, str]] = [{} for _ in range(world)]
    dist.all_gather_object(everyone, mine)
    for name in mine:
        ranks_of: dict[str, list[int]] = {}
        for rank, found in enumerate(everyone):
            ranks_of.setdefault(found[name], []).append(rank)
        if len(ranks_of) == 1:
            continue
        text = "; ".join(f"{value} on ranks {ranks}" for value, ranks in ranks_of.items())
        yield Finding("error", f"{name} differs", text, "start all nodes from one image")
    yield Finding("ok", "ranks", f"{world} on {_count_hosts(world)} host(s)")


def _count_hosts(world: int) -> int:
    hosts: list[str] = [""] * world
    dist.all_gather_object(hosts, platform.node())
    return len(set(hosts))


def _source_digest() -> str:
    """Digest of this package's sources, as nodes may see different checkouts."""
    import hashlib

    import megatron_croc

    digest = hashlib.sha256()
    for path in sorted(Path(megatron_croc.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _all_reduce(size: int, world: int, repeats: int = 5) -> Finding:
    tensor = torch.ones(size // 4, dtype=torch.float32, device=device.current_device())
    dist.all_reduce(tensor)
    wrong: list[int] = [0] * world
    dist.all_gather_object(wrong, int((tensor != world).sum()))
    if any(wrong):
        ranks = [rank for rank, count in enumerate(wrong) if count]
        return Finding(
            "error",
            f"all-reduce {size // _MIB} MiB",
            f"{sum(wrong)} wrong sums, on ranks {ranks}",
            "a link or a driver is broken: test node pairs with NCCL_DEBUG=INFO",
        )
    times = []
    for _ in range(repeats):
        device.synchronize()
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        device.synchronize()
        times.append(time.perf_counter() - started)
    # Bytes each rank moves in a ring, as nccl-tests counts its bus bandwidth.
    bus = 2 * (world - 1) / world * size / statistics.median(times)
    text = f"right; {statistics.median(times) * 1e3:.2f} ms, bus bandwidth {bus / 1e9:.2f} GB/s"
    return Finding("ok", f"all-reduce {size // _MIB} MiB", text)


def _clock_skew(rounds: int = 5) -> Finding:
    """Largest difference of the hosts' clocks, as far as leaving a barrier together shows it."""
    skews = []
    for _ in range(rounds):
        dist.barrier()
        now: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(now, time.time())
        skews.append(max(now) - min(now))
    skew = min(skews)  # the round that was disturbed least
    if skew > MAX_CLOCK_SKEW_S:
        return Finding("warning", "clocks", f"{skew:.1f} s apart", "let chrony or ntpd set them")
    return Finding("ok", "clocks", f"at most {skew * 1e3:.1f} ms apart")


def look_at_disk(folder: Path, size: int = 256 * _MIB) -> Finding:
    """Write, sync and read back a file where checkpoints will go.

    Args:
        folder: made when it is not there.
        size: bytes of the file.
    """
    block = os.urandom(4 * _MIB)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            started = time.perf_counter()
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - started
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(
            "error", "disk", f"{folder}: {error.strerror}", "choose another --save folder"
        )
    text = f"{folder}: {size / written / 1e6:,.0f} MB/s written, {free / 2**30:,.0f} GiB free"
    return Finding("ok", "disk", text)


def look_at_checkpoint_size(run: RunConfig, folder: Path) -> Finding:
    """Compare the size of a checkpoint of `run` with the free space of the disk."""
    from megatron_croc.config.parts import trained_parts
    from megatron_croc.model.parameters import count_parameters

    counts = count_parameters(run.model)
    trained = trained_parts(run.training, reconstructs=run.reconstructs)
    weights = sum(counts.values()) * (2 if run.training.bf16 else 4)
    size = weights + 12 * sum(counts[part] for part in trained)
    free = shutil.disk_usage(folder).free
    text = f"about {size / 2**30:,.1f} GiB each, {free / 2**30:,.0f} GiB free"
    if free < 2 * size:
        return Finding(
            "warning", "checkpoints", text, "two must fit: the new one is written beside the old"
        )
    return Finding("ok", "checkpoints", text)


def look_at_loader(run: RunConfig, seconds: float) -> Finding:
    """Samples per second of the training loader of one data-parallel rank, nothing else running.

    Args:
        run: with data_path and tokenizer.
        seconds: how long to read.

    Raises:
        DataError: data or tokenizer are missing or damaged.
    """
    from megatron_croc.data.loader import build_train_loader

    with build_train_loader(run, dp_rank=0, dp_size=1, state=None) as loader:
        next(loader)  # opening files and starting threads is not the rate
        started, samples = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            next(loader)
            samples += run.training.micro_batch_size
        rate = samples / (time.perf_counter() - started)
    workers = run.data.num_workers
    return Finding("ok", "loader", f"{rate:,.0f} samples/s with {workers} worker thread(s)")
