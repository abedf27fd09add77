#!/usr/bin/env python
"""Cost of loading data for a training step: five ways to read the same shards.

    python benchmarks/data.py                      # about five minutes on two cores
    python benchmarks/data.py --images 64 --seconds 2 --out /tmp/data     # a quick look

Every way gets photo-like JPEGs (640 x 480, 336 x 336 out, padded to a square) in batches, and one
worker. Measured are images per second of CPU and of wall time, CPU-milliseconds per image over all
of its processes, the time to the first batch, memory, and what a training step waits for data when
it computes for a given time itself. Each way runs in a process of its own.

    pil_hf          DataLoader, PIL and the Hugging Face processor         (what LLaVA does)
    pil_uint8       DataLoader, PIL pad and resize, pixels stay uint8
    webdataset_hf   the webdataset library, then as pil_hf
    dali_reader     fn.readers.webdataset -> decode -> pad -> resize, all in DALI
    ours            the trainer's own loader, tokenisation and packing included
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from megatron_croc.data.records.reading import parse_text
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.data.store.shard_writer import ShardWriter, write_manifest
from megatron_croc.data.store.shards import ShardedDataset

SIZE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)
FILL = (122, 116, 104)
WAYS = ("pil_hf", "pil_uint8", "webdataset_hf", "dali_reader", "ours")
RESULTS = Path(__file__).parent / "results"


def photo(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG with the spectrum of a photo: noise whose strength falls with its frequency."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        noise = generator.standard_normal((max(2, 2**octave * height // width), 2**octave, 3))
        noise = (noise + 1.5 * noise.mean(2, keepdims=True)).astype(np.float32)
        planes = (Image.fromarray(noise[..., c]).resize((width, height), 3) for c in range(3))
        pixels += np.stack([np.asarray(plane) for plane in planes], 2) * 2.0 ** (-0.75 * octave)
    pixels = (pixels - pixels.mean()) / pixels.std() * 55 + 120
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_data(folder: Path, num_images: int) -> float:
    """Shards of distinct photos and a tokenizer; returns the mean size of an image, bytes."""
    from megatron_croc.data.demo.dataset import train_tokenizer

    shards = folder / "shards"
    shards.mkdir(parents=True)
    infos, total = [], 0
    for shard, begin in enumerate(range(0, num_images, 256)):
        with ShardWriter(shards, shard) as writer:
            for number in range(begin, min(begin + 256, num_images)):
                text = " ".join(f"a red circle left of a blue square {i}" for i in range(10))
                data = photo(number)
                total += len(data)
                messages = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
                writer.add({"conversations": messages}, [("jpg", data)])
        infos.append(writer.info)
    write_manifest(shards, infos)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed=1))
    return total / num_images


def pad_square(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), FILL)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


@functools.cache
def hf_processor() -> Any:
    """CLIP's processor as LLaVA calls it."""
    from transformers import CLIPImageProcessorPil as Processor

    edge = {"shortest_edge": SIZE}
    return Processor(size=edge, crop_size={"height": SIZE, "width": SIZE})


def with_hf(data: bytes) -> torch.Tensor:
    """float [3, SIZE, SIZE]."""
    image = pad_square(Image.open(io.BytesIO(data)).convert("RGB"))
    return hf_processor()(image, return_tensors="pt")["pixel_values"][0]


def with_pil(data: bytes) -> torch.Tensor:
    """uint8 [3, SIZE, SIZE]."""
    image = pad_square(Image.open(io.BytesIO(data)).convert("RGB"))
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class MapDataset(torch.utils.data.Dataset):
    """Our shards behind torch's interface."""

    def __init__(self, folder: Path, transform: Callable[[bytes], torch.Tensor]) -> None:
        """Args: folder: with the shards. transform: of an encoded image."""
        self._folder, self._transform = folder, transform
        self._dataset: ShardedDataset | None = None

    def __len__(self) -> int:
        """Enough never to end."""
        return 10**7

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image."""
        if self._dataset is None:
            self._dataset = ShardedDataset(self._folder)
        return self._transform(self._dataset.read(index % len(self._dataset)).image_bytes[0])


def open_dataloader(folder: Path, batch: int, transform: Callable) -> Iterator[torch.Tensor]:
    """A DataLoader with one worker."""
    dataset = MapDataset(folder / "shards", transform)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=1))


def open_webdataset(folder: Path, batch: int) -> Iterator[torch.Tensor]:
    """The webdataset library in a DataLoader with one worker."""
    from webdataset.compat import WebDataset

    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    dataset = WebDataset(tars, shardshuffle=False, empty_check=False).repeat()
    dataset = dataset.map(_webdataset_image)  # type: ignore[attr-defined]
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=1)
    return iter(loader)


def _webdataset_image(sample: dict) -> torch.Tensor:
    parse_text(sample["json"], "json")
    return with_hf(sample["0.jpg"])


def open_dali_reader(folder: Path, batch: int) -> Iterator[torch.Tensor]:
    """DALI's own reader, decode and resize."""
    from nvidia.dali import fn as typed_fn
    from nvidia.dali import pipeline_def, types

    fn: Any = typed_fn  # its stubs do not know what a reader returns
    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))

    @pipeline_def
    def pipeline():
        encoded, _ = fn.readers.webdataset(
            paths=tars, ext=["0.jpg", "json"], missing_component_behavior="error", name="reader"
        )
        image = fn.decoders.image(encoded, device="cpu", output_type=types.DALIImageType.RGB)
        shape = fn.peek_image_shape(encoded)
        side = fn.reductions.max(fn.slice(shape, 0, 2, axes=[0]))
        image = fn.crop(
            image,
            crop_w=fn.cast(side, dtype=types.DALIDataType.FLOAT),
            crop_h=fn.cast(side, dtype=types.DALIDataType.FLOAT),
            out_of_bounds_policy="pad",
            fill_values=list(FILL),
        )
        image = fn.resize(
            image,
            size=[SIZE, SIZE],
            interp_type=types.DALIInterpType.INTERP_CUBIC,
            antialias=True,
        )
        return fn.transpose(image, perm=[2, 0, 1])

    pipe: Any = pipeline(
        batch_size=batch, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=2
    )
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield torch.from_numpy(np.array(images.as_tensor()))


def open_ours(folder: Path, batch: int) -> Iterator[torch.Tensor]:
    """The trainer's loader."""
    from megatron_croc.data.loader import build_train_loader
    from megatron_croc.recipes.tiny import tiny

    run = tiny("pretrain_croc")
    run.model.vision_tower.img_size = SIZE
    run.model.vision_tower.image_mean = MEAN
    run.model.vision_tower.patch_dim = 14
    run.model.language_model.vocab_size = 32_000
    run.data.seq_length = 2048
    run.data.data_path = (str(folder / "shards"),)
    run.data.tokenizer_model = str(folder / "tokenizer.model")
    run.data.num_workers, run.data.prefetch_factor = 1, 2
    run.training.micro_batch_size = run.training.global_batch_size = batch
    with build_train_loader(run, dp_rank=0, dp_size=1, state=None) as loader:
        for made in loader:
            assert made.pixel_values is not None and len(made.pixel_values) == batch
            yield made.pixel_values


def open_way(way: str, folder: Path, batch: int) -> Iterator[torch.Tensor]:
    """Batches of one of the ways, without end."""
    if way in ("pil_hf", "pil_uint8"):
        return open_dataloader(folder, batch, with_hf if way == "pil_hf" else with_pil)
    opened = {
        "webdataset_hf": open_webdataset,
        "dali_reader": open_dali_reader,
        "ours": open_ours,
    }
    return opened[way](folder, batch)


def tree() -> list[psutil.Process]:
    """This process and its children."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_seconds() -> float:
    """CPU time of the process and its children so far."""
    times = (process.cpu_times() for process in tree())
    return sum(t.user + t.system for t in times)


def memory_mb() -> float:
    """Memory of the process and its children, shared pages counted once (PSS)."""
    return sum(process.memory_full_info().pss for process in tree()) / 1e6


def measure(way: str, folder: Path, batch: int, seconds: float, step: float) -> dict[str, float]:
    """One way's figures; call it in a process of its own."""
    torch.set_num_threads(1)
    base = memory_mb()
    begin = time.perf_counter()
    batches = open_way(way, folder, batch)
    next(batches)
    first = time.perf_counter() - begin
    for _ in range(3):
        next(batches)

    images, begin, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - begin < seconds:
        images += len(next(batches))
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    memory = memory_mb() - base

    waits = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds / 2:
        time.sleep(step)  # the device computes; the CPU is free
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
    return {
        "cpu_ms_per_image": 1e3 * cpu / images,
        "images_per_cpu_second": images / cpu,
        "images_per_second": images / wall,
        "first_batch_s": first,
        "memory_mb": memory,
        "wait_ms_mean": 1e3 * float(np.mean(waits)),
        "wait_ms_p99": 1e3 * float(np.percentile(waits, 99)),
        "images_measured": images,
    }


def parity(folder: Path) -> dict[str, float]:
    """Ours against PIL, in 8-bit levels, over the photos of the first shard."""
    from megatron_croc.data.sample.decode import ImageDecoder

    dataset = ShardedDataset(folder / "shards")
    images = [dataset.read(i).image_bytes[0] for i in range(min(64, len(dataset)))]
    transform = ImageTransform(img_size=SIZE, aspect_ratio="pad", fill=FILL)
    ours = torch.stack([t for t in ImageDecoder(transform, "dali").decode(images)])  # type: ignore[arg-type]
    error = (ours.int() - torch.stack([with_pil(data) for data in images]).int()).abs()
    return {"max_levels": error.max().item(), "mean_levels": error.float().mean().item()}


def _send(connection: Any, function: Callable, arguments: tuple) -> None:
    connection.send(function(*arguments))
    connection.close()
    os._exit(0)  # workers and threads of a way that is over need not be waited for


def in_own_process(function: Callable, *arguments: object) -> Any:
    """Call in a fresh process, so that one way's memory and threads do not burden the next."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        result = None
    for child in psutil.Process(process.pid).children(recursive=True) if result is None else ():
        child.kill()
    process.join()
    return result


def table(results: dict[str, dict[str, float]]) -> Iterator[str]:
    """For people."""
    yield (
        "way            CPU-ms/image  x less CPU  images/s  images/CPU-s  first batch  memory  "
        "wait mean / p99"
    )
    worst = results["pil_hf"]["cpu_ms_per_image"]
    for way, r in results.items():
        yield (
            f"{way:<15}{r['cpu_ms_per_image']:>12.2f}{worst / r['cpu_ms_per_image']:>11.2f}x"
            f"{r['images_per_second']:>10.0f}{r['images_per_cpu_second']:>14.0f}"
            f"{r['first_batch_s']:>11.2f} s{r['memory_mb']:>5.0f} MB"
            f"{r['wait_ms_mean']:>8.1f} / {r['wait_ms_p99']:.1f} ms"
        )


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """Two bars per way: CPU per image, and the wait of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    names = list(results)[::-1]
    colours = ["#4477aa" if name == "ours" else "#bbbbbb" for name in names]
    labels = {"cpu_ms_per_image": "CPU-ms per image", "wait_ms_mean": "mean wait of a step, ms"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        bars = axis.barh(names, [results[name][key] for name in names], color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Make the data, measure every way, print and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256, help="distinct photos")
    parser.add_argument("--batch", type=int, default=16, help="images of a batch")
    parser.add_argument("--seconds", type=float, default=14.0, help="measuring time of each way")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the best CPU time is kept")
    parser.add_argument("--step-ms", type=float, default=100.0, help="what a step computes, ms")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of data.json, data.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mean_bytes = make_data(folder, arguments.images)
        results: dict[str, dict[str, float]] = {}
        # Round after round: a machine that slows down for a while slows all ways alike.
        for way in [*arguments.ways] * arguments.repeats:
            measured = in_own_process(
                measure, way, folder, arguments.batch, arguments.seconds, arguments.step_ms / 1e3
            )
            if measured is None:
                raise SystemExit(f"error: {way} failed; its message stands above")
            best = results.get(way)
            if best is None or measured["cpu_ms_per_image"] < best["cpu_ms_per_image"]:
                results[way] = measured
        levels = parity(folder)
    for line in table(results) if "pil_hf" in results else [json.dumps(results, indent=1)]:
        print(line)
    print(
        f"pixels of ours against PIL: {levels['max_levels']} levels at most, "
        f"{levels['mean_levels']:.4f} on average"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "mean_image_bytes": round(mean_bytes),
        "batch": arguments.batch,
        "step_ms": arguments.step_ms,
        "ways": results,
        "pixels_against_pil": levels,
    }
    (arguments.out / "data.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(results, arguments.out / "data.png")


if __name__ == "__main__":
    main()
