"""The same records give the same samples in every form; files are chosen aloud."""

import base64
import csv
import io
import json
import os
import random
import tarfile

import pytest

from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.prepare.shard_job import Report
from megatron_croc.data.prepare.tar_index import TarIndexer
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError
from tests.unit.data.small_samples import jpeg

PICTURES = {f"{number}.jpg": jpeg(number) for number in range(6)}


def make(paths, output, **options):
    """Preprocess; return the report."""
    options = {"image_folder": None, "samples_per_shard": 4} | options
    job = Preprocessor(input_path=paths, output=output, **options)
    list(job.make_shards(1))
    return job.finish()


def index(paths, output) -> Report:
    job = TarIndexer(input_path=paths, output=output)
    list(job.make_indices(1))
    return job.finish()


def samples(folder):
    dataset = ShardedDataset(folder)
    raw = [dataset.read(number) for number in range(len(dataset))]
    return [(one.conversations, one.image_bytes) for one in raw]


def captions(folder):
    return [messages[-1]["value"] for messages, _ in samples(folder)]


def told(report) -> str:
    return "\n".join(report.lines())


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def picture(number):
    return {"bytes": PICTURES[f"{number}.jpg"], "path": f"{number}.jpg"}


def image_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    return folder


def random_records(seed):
    """Records of one column set, a caption or a talk, with 0 to 3 images."""
    draw = random.Random(seed)
    records = []
    kind = draw.choice(["caption", "talk", "chat", "pair", "parts"])
    for number in range(9):
        names = draw.sample(sorted(PICTURES), draw.randrange(4))
        marks = "".join(f"<image> {place} " for place in range(len(names)))
        question, answer = f"{marks}what is {number}?", f"a thing {number}"
        text = {
            "caption": {"caption": answer},
            "talk": {
                "conversations": [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": answer},
                ]
            },
            "chat": {
                "messages": [
                    {"role": "system", "content": "be kind"},
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            },
            "pair": {"question": question, "answer": answer},
            "parts": {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "text": None}] * len(names)
                        + [{"type": "text", "text": f"what is {number}?"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ]
            },
        }[kind]
        records.append({"id": f"r{number}", "note": "x", "images": names, **text})
    return records


@pytest.mark.parametrize("seed", range(6))
def test_the_same_records_give_the_same_samples(tmp_path, seed):
    records = random_records(seed)
    folder = image_folder(tmp_path)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    urls = [
        r | {"images": [base64.b64encode(PICTURES[n]).decode() for n in r["images"]]}
        for r in records
    ]
    (tmp_path / "b.json").write_text(json.dumps(urls))
    write_parquet(
        tmp_path / "a.parquet",
        [r | {"images": [picture(int(n[0])) for n in r["images"]]} for r in records],
    )
    write_parquet(tmp_path / "names.parquet", records)
    members = []
    for number, record in enumerate(records):
        named = [f"{number}.{name}" for name in record["images"]]
        members.append((f"{number}.json", json.dumps(record | {"images": named}).encode()))
        # In any order: the record says the order.
        images = [(name, PICTURES[name.partition(".")[2]]) for name in named]
        members += sorted(images, reverse=bool(number % 2))
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "a.tar.gz", members, "w:gz")
    half = len(members) // 2
    cut = next(i for i in range(half, 0, -1) if members[i][0].endswith("json"))
    two = [write_tar(tmp_path / f"{n}.tar", m) for n, m in
           enumerate((members[:cut], members[cut:]))]  # fmt: skip
    (tmp_path / "end_to_end.tar").write_bytes(b"".join(tar.read_bytes() for tar in two))

    reports = {}
    for name in ("a.json", "a.jsonl", "names.parquet"):
        reports[name] = make(tmp_path / name, tmp_path / f"out-{name}", image_folder=folder)
    for name in ("b.json", "a.parquet", "a.tar", "a.tar.gz", "end_to_end.tar"):
        reports[name] = make(tmp_path / name, tmp_path / f"out-{name}")
    reports["two"] = make(two, tmp_path / "out-two")
    for name in ("a.tar", "end_to_end.tar"):
        reports[f"index-{name}"] = index([tmp_path / name], tmp_path / f"out-index-{name}")

    expected = samples(tmp_path / "out-a.json")
    assert [len(images) for _, images in expected] == [len(r["images"]) for r in records]
    for (_, images), record in zip(expected, records, strict=True):
        assert images == [PICTURES[name] for name in record["images"]]
    for name, report in reports.items():
        assert report.num_skipped == {}, name
        assert samples(tmp_path / f"out-{name}") == expected, name
        assert "field note is not read (9 records), first: 'x'" in told(report), name
    assert "end mark is read too" in told(reports["index-end_to_end.tar"])


def test_image_folders(tmp_path):
    """metadata.jsonl, .csv (with a byte order mark) and .parquet, beside the images or above."""
    rows = [{"file_name": f"{n}.jpg", "text": f"text, {n}"} for n in range(3)]
    for number, kind in enumerate(("jsonl", "csv", "parquet")):
        folder = tmp_path / kind
        image_folder(folder.parent).rename(folder)
        path = folder / f"metadata.{kind}"
        if kind == "jsonl":
            path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
        elif kind == "csv":
            with open(path, "w", encoding="utf-8-sig", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            write_parquet(path, rows)
        for where, given in ((folder, "folder"), (path, "file")):
            report = make(where, tmp_path / f"out{number}{given}")
            assert (report.num_images, report.num_skipped) == (3, {}), (kind, given)
            assert captions(tmp_path / f"out{number}{given}") == ["text, 0", "text, 1", "text, 2"]
    for split in ("train", "test"):
        (tmp_path / "whole").mkdir(exist_ok=True)
        os.rename(tmp_path / {"train": "csv", "test": "jsonl"}[split], tmp_path / "whole" / split)
    report = make(tmp_path / "whole", tmp_path / "train alone")
    assert (report.num_images, "split test left out" in told(report)) == (3, True)


def test_an_image_folder_in_vain_is_refused(tmp_path):
    folder = image_folder(tmp_path)
    for number, record in enumerate(({"headline": "x", "caption": "a"}, {"caption": "a"})):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([record] * 5))
        with pytest.raises(DataError, match=r"--image-folder .* none of 5 records") as caught:
            make(path, tmp_path / f"out{number}", image_folder=folder)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / f"out{number}" / "manifest.json").exists()


def test_each_parquet_file_by_its_own_columns(tmp_path):
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]
    columns = {"from": ["human", "gpt"], "value": ["<image>\nwhat?", "c"]}
    write_parquet(tmp_path / "in" / "a.parquet", [{"image": picture(0), "caption": "a"}] * 2)
    write_parquet(tmp_path / "in" / "b.parquet", [{"images": [picture(1)], "conversations": talk}])
    write_parquet(tmp_path / "in" / "c.parquet", [{"photo": picture(2), "conversations": columns}])
    report = make(tmp_path / "in", tmp_path / "out")
    assert (report.num_images, report.num_skipped) == (4, {})
    assert captions(tmp_path / "out") == ["a", "a", "b", "c"]


def test_names_of_images(tmp_path):
    folder = image_folder(tmp_path)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "ocr.gif").write_bytes(PICTURES["1.jpg"])
    (folder / "lfs.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    images = {
        str(folder / "0.jpg"): None,
        "./1.jpg": None,
        "ocr.jpg": None,
        "loop.jpg": "in a circle",
        "http://a/b.jpg": "not fetched",
        "lfs.jpg": "git lfs pull",
        "../images/0.jpg": "outside",
    }
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"image": name, "caption": name} for name in images]))
    report = make(path, tmp_path / "out", image_folder=folder)
    assert (report.num_images, len(report.skipped)) == (3, 4)
    reasons = [entry.reason for entry in report.skipped]
    for reason in filter(None, images.values()):
        assert any(reason in one for one in reasons), reason
    assert "another suffix than its record says (1 records), first: ocr.jpg is ocr.gif" in told(
        report
    )


def test_shapes_that_training_refuses(tmp_path):
    from PIL import Image

    folder = tmp_path / "img"
    folder.mkdir()
    Image.new("1", (9_500, 2)).save(folder / "long.png")
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"image": "long.png", "caption": "x"}, {"caption": "y"}]))
    with pytest.raises(DataError, match="too long and thin"):
        make(path, tmp_path / "pad", image_folder=folder)
    Image.new("1", (9_500, 50)).save(folder / "long.png")
    report = make(path, tmp_path / "square", image_folder=folder, image_aspect_ratio="square")
    assert report.num_images == 1
