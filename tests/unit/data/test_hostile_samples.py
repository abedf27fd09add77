"""Whatever a tar holds: skipped, counted, named; never a crash, a hang or a silent repeat.

Each hostile sample stands between two good ones, in a tar we did not write, which is indexed in
place and trained on, and also made into shards.
"""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_croc.data.batch_builder import BatchBuilder
from megatron_croc.data.loader import build_valid_loader
from megatron_croc.data.order.row_plan import Slot
from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.prepare.tar_index import TarIndexer
from megatron_croc.data.sample.decode import ImageDecoder
from megatron_croc.data.sample.image_header import ImageError
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError
from tests.unit.data.small_samples import conversation, jpeg

TEXT = json.dumps({"conversations": conversation(7, 1)}).encode()


def member(name, data=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, target
    return info, data


def sample(key, text=TEXT, image=None, suffix="jpg"):
    return [
        member(f"{key}.json", text),
        member(f"{key}.{suffix}", jpeg(3) if image is None else image),
    ]


def tar_of(path, members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def image_file(image_format, mode="RGB", size=(30, 20), **options):
    colours = np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize(size).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def grey16():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(buffer, "PNG")
    return buffer.getvalue()


def png_claiming(width, height):
    """A header without the pixels it promises."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + head + b"\0\0\0\0IEND\xaeB`\x82"


def jpeg_claiming(width, height, *, before=False):
    """A JPEG whose frame header lies; `before`: a lying header stands before the true one."""
    data = jpeg(3)
    at = data.index(b"\xff\xc0")
    size = struct.pack(">HH", height, width)
    if not before:
        return data[: at + 5] + size + data[at + 9 :]
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:at] + data[at : at + 5] + size + data[at + 9 : end] + data[at:]


def conversation_text(question, answer):
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": messages}).encode()


GOOD = None
"""Odd, but every decoder can read it."""

CASES = {
    # name: (members, kind it is counted as)
    "cmyk": (sample("x", image=image_file("JPEG", "CMYK")), GOOD),
    "16-bit": (sample("x", image=grey16(), suffix="png"), GOOD),
    "1x1": (sample("x", image=image_file("PNG", size=(1, 1)), suffix="png"), GOOD),
    "wrong extension": (sample("x", image=image_file("PNG"), suffix="jpg"), GOOD),
    "alpha": (sample("x", image=image_file("PNG", "RGBA"), suffix="png"), GOOD),
    "empty image": (sample("x", image=b""), "image"),
    "not an image": (sample("x", image=b"<html>404</html>"), "image"),
    "truncated jpeg": (sample("x", image=jpeg(3)[:-300]), "image"),
    "100 megapixels": (sample("x", image=png_claiming(10_000, 10_000), suffix="png"), "image"),
    "65500 squared": (sample("x", image=jpeg_claiming(65500, 65500)), "image"),
    "png of 2^31": (sample("x", image=png_claiming(2**31 - 1, 2**31 - 1), suffix="png"), "image"),
    "long and thin": (sample("x", image=png_claiming(80_000, 1), suffix="png"), "image"),
    "not utf-8": (sample("x", text=b'{"caption": "\xff\xfe"}'), "record"),
    "deeply nested": (sample("x", text=b"[" * 200_000), "record"),
    "half a surrogate": (sample("x", text=conversation_text("<image>", "\ud800")), "record"),
    "not json": (sample("x", text=b"{"), "record"),
    "a list": (sample("x", text=b"[]"), "record"),
    "no messages": (sample("x", text=b'{"conversations": 3}'), "record"),
    "empty text": (sample("x", text=conversation_text("<image>", " ")), "no_answer"),
    "empty caption": (sample("x", text=b'{"caption": ""}'), "no_answer"),
    "missing caption": (sample("x", text=b'{"url": "a"}'), "missing_caption"),
    "no text member": (sample("x")[1:], "missing_caption"),
    "missing image": (sample("x")[:1], "image_marks"),
    "two images, one mark": ([*sample("x"), member("x.1.png", jpeg(2))], "image_marks"),
    "image twice": ([*sample("x"), member("x.jpg", jpeg(2))], "duplicate_key"),
    "key again later": ([*sample("y"), *sample("good-0")], "duplicate_key"),
    "path traversal": (sample("../../x"), "unsafe_member"),
    "absolute path": (sample("/etc/x"), "unsafe_member"),
    "symlink": (
        [*sample("x")[:1], member("x.jpg", kind=tarfile.SYMTYPE, target="/etc/passwd")],
        "unsafe_member",
    ),
    "hard link": (
        [*sample("x")[:1], member("x.jpg", kind=tarfile.LNKTYPE, target="good-0.jpg")],
        "unsafe_member",
    ),
    "device": ([*sample("x")[:1], member("x.jpg", kind=tarfile.CHRTYPE)], "unsafe_member"),
}


def index(folder, *tars):
    job = TarIndexer(input_path=tars, output=folder)
    list(job.make_indices(1))
    return job.finish()


def train(run, num_batches=6):
    """(shape, ids) of the first batches, and the bad samples met."""
    with build_valid_loader(run, dp_rank=0, dp_size=1) as loader:
        batches = [next(loader) for _ in range(num_batches)]
        return (
            [
                (b.pixel_values.shape[1:], b.sample_ids, b.pixel_values.sum().item())
                for b in batches
            ],
            loader.bad_counts,
        )


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_every_kind_is_skipped_counted_and_named(tmp_path, make_run, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    for name, (members, kind) in CASES.items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        tar = tar_of(folder / "a.tar", [*sample("good-0"), *members, *sample("good-1")])
        report = index(folder / "set", tar)
        run = make_run(str(folder / "set"))
        run.data.image_decoder, run.data.num_workers = decoder, 0
        run.data.bad_sample_report = str(folder / "report")
        run.data.max_bad_fraction = 1.0
        batches, met = train(run)
        shapes = {shape for shape, _, _ in batches}
        size = run.model.vision_tower.img_size
        assert shapes == {(3, size, size)}, name
        if report.num_skipped:
            assert report.num_skipped == {kind: 1}, name
            assert report.num_samples == report.num_records - 1, name
            lines = (folder / "set" / "skipped.jsonl").read_text().splitlines()
            assert [json.loads(line)["kind"] for line in lines] == [kind], name
            assert not met, name
        elif kind is GOOD:
            assert not met, name
        else:
            # 12 slots of 3 samples: the bad one keeps its slot in each of the four epochs.
            assert met == {kind: 4}, name
            lines = (folder / "report" / "bad_samples-0.jsonl").read_text().splitlines()
            assert {json.loads(line)["sample"] for line in lines} == {"set/000000-000001"}, name
        ids = [i for _, batch_ids, _ in batches for i in batch_ids]
        assert ids == [f"set/000000-{i % report.num_samples:06d}" for i in range(12)], name
        assert train(run)[0] == batches, name


def test_shards_are_made_of_the_good_ones_alone(tmp_path):
    tars = []
    for number, (members, _) in enumerate(CASES.values()):
        path = tmp_path / f"{number:02d}.tar"
        tars.append(tar_of(path, [*sample("good-0"), *members, *sample("good-1")]))
    job = Preprocessor(
        input_path=tars, image_folder=None, output=tmp_path / "out", samples_per_shard=10
    )
    list(job.make_shards(1))
    report = job.finish()
    # Preprocessing reads headers alone.
    undetected = {"truncated jpeg"}
    expected = [k for name, (_, k) in CASES.items() if k is not GOOD and name not in undetected]
    assert report.num_skipped == {kind: expected.count(kind) for kind in set(expected)}
    assert report.num_samples == 3 * len(CASES) + 1 - len(expected)  # one case brings two
    assert sum(report.num_skipped_by_source.values()) == len(expected)
    named = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert len(named) == len(expected)


@pytest.mark.parametrize("at", [512 * 3 + 100, 512 * 8 + 200, -1024 - 300, -1024])
def test_a_truncated_tar_keeps_what_is_whole(tmp_path, at):
    tar = tar_of(tmp_path / "a.tar", [m for i in range(6) for m in sample(f"k{i}")])
    end = tar.stat().st_size // 512 * 512
    whole = tar.read_bytes().rstrip(b"\0")
    content = tar.read_bytes()[: at if at > 0 else min(end, len(whole) // 512 * 512 + 512) + at]
    tar.write_bytes(content)
    try:
        report = index(tmp_path / "set", tar)
    except DataError as error:
        assert "not one of" in str(error)
        return
    assert report.num_skipped["damaged_tar"] in (1, 2)  # the cut sample, and what followed it
    dataset = ShardedDataset(tmp_path / "set")
    assert 0 < len(dataset) < 6
    for i in range(len(dataset)):
        assert dataset.read(i).image_bytes == [jpeg(3)]


def test_an_index_of_another_tar_is_refused(tmp_path):
    a = tar_of(tmp_path / "a.tar", [m for i in range(6) for m in sample(f"k{i}")])
    b = tar_of(tmp_path / "b.tar", [m for i in range(9) for m in sample(f"k{i}")])
    index(tmp_path / "set", a)
    a.write_bytes(b.read_bytes())
    with pytest.raises(DataError, match=r"a\.tar has \d+ bytes, its manifest says"):
        ShardedDataset(tmp_path / "set")


def test_rotten_data_stops_the_run_with_a_list(tmp_path, make_run):
    members = [
        m for i in range(200) for m in sample(f"k{i:03d}", image=b"rotten" if i % 2 else None)
    ]
    index(tmp_path / "set", tar_of(tmp_path / "a.tar", members))
    run = make_run(str(tmp_path / "set"))
    run.data.max_bad_fraction = 0.1
    with (
        pytest.raises(DataError, match=r"image: \d+; set: \d+.*max_bad_fraction = 0\.1") as caught,
        build_valid_loader(run, dp_rank=0, dp_size=1) as loader,
    ):
        for _ in range(100):
            next(loader)
    assert "sample set/000000-000001" in str(caught.value)


def mutate(content: bytes, generator: np.random.Generator) -> bytes:
    """One to four random injuries."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 5)):
        at, length = int(generator.integers(len(data))), int(generator.integers(1, 600))
        match int(generator.integers(5)):
            case 0:
                data[at] ^= 1 << int(generator.integers(8))
            case 1:
                data[at : at + length] = generator.bytes(len(data[at : at + length]))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[max(0, at - length) : at]
            case 4:
                del data[max(at, 600) :]
    return bytes(data)


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_fuzzed_tars(tmp_path, make_run, decoder):
    """Mutated tars are indexed and trained on; nothing but a DataError may come out."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    content = tar_of(
        tmp_path / "a.tar", [m for i in range(6) for m in sample(f"k{i}", image=jpeg(i))]
    ).read_bytes()
    generator = np.random.default_rng(0)
    trained = 0
    for trial in range(40):
        folder = tmp_path / str(trial)
        folder.mkdir()
        (folder / "a.tar").write_bytes(mutate(content, generator))
        try:
            index(folder / "set", folder / "a.tar")
            run = make_run(str(folder / "set"))
            run.data.image_decoder = decoder
            builder = BatchBuilder(
                data=run.data,
                model=run.model,
                reconstructs=run.reconstructs,
                folders=run.data.data_path,
                seed=0,
                pad_to_multiple_of=1,
            )
        except DataError:
            continue
        slots = [Slot(epoch=0, index=index) for index in range(builder.num_samples)]
        batch, bad = builder.build(slots)
        again, bad_again = builder.build(slots)
        assert len(batch.sample_ids) == len(set(batch.sample_ids)) == len(slots)
        assert (batch.pixel_values == again.pixel_values).all()
        assert [str(e) for e in bad] == [str(e) for e in bad_again]
        trained += 1
    assert trained > 20


def test_fuzzed_images():
    """Mutated images of every kind; DALI and PIL agree on which of them are images."""
    pytest.importorskip("nvidia.dali")
    transform = ImageTransform(img_size=28, aspect_ratio="pad", fill=(122, 116, 104))
    dali, pil = (ImageDecoder(transform, name) for name in ("dali", "pil"))
    generator = np.random.default_rng(1)
    originals = [jpeg(0), image_file("PNG"), image_file("WEBP"), image_file("BMP"), grey16()]
    originals += [image_file("GIF", "P"), image_file("TIFF"), image_file("JPEG", progressive=True)]
    images = [mutate(originals[i % len(originals)], generator) for i in range(400)]
    for some in (images[i : i + 40] for i in range(0, 400, 40)):
        for a, b in zip(dali.decode(some), pil.decode(some), strict=True):
            if isinstance(b, ImageError):
                continue  # DALI forgives a few cut files that PIL refuses
            assert not isinstance(a, ImageError)


def test_a_second_frame_header_does_not_fool_the_size_check():
    """PIL reads the last header, a decoder may read the first: 12 GB if it is believed."""
    pytest.importorskip("nvidia.dali")
    transform = ImageTransform(img_size=28, aspect_ratio="pad", fill=(122, 116, 104))
    (result,) = ImageDecoder(transform, "dali").decode([jpeg_claiming(65500, 65500, before=True)])
    assert isinstance(result, ImageError)
