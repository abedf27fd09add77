"""The same records give the same samples in every form; files are chosen aloud."""

import base64
import csv
import gzip
import io
import json
import os
import random
import tarfile

import pytest

from megatron_croc.data.prepare.inputs import open_input
from megatron_croc.data.prepare.inputs.files import find_files
from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.prepare.shard_job import Report
from megatron_croc.data.prepare.tar_index import TarIndexer
from megatron_croc.data.records.fields import FieldRules
from megatron_croc.data.records.splits import split_of
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


def test_splits_are_never_merged_in_silence(tmp_path):
    data = tmp_path / "hub" / "data"
    for split in ("train", "validation", "test"):
        name = f"{split}-00000-of-00001.parquet"
        write_parquet(data / name, [{"image": picture(0), "caption": split}])
    (tmp_path / "hub" / "README.md").write_text("a dataset")
    report = make(tmp_path / "hub", tmp_path / "a")
    assert captions(tmp_path / "a") == ["train"]
    assert "split validation left out (1 files)" in told(report)
    make(data, tmp_path / "b", split=["val"])
    assert captions(tmp_path / "b") == ["validation"]
    report = make(str(data / "*.parquet"), tmp_path / "c", split=["all"])
    assert sorted(captions(tmp_path / "c")) == ["test", "train", "validation"]
    assert "splits merged as asked" in told(report)
    with pytest.raises(DataError, match=r"several splits, .*--split train"):
        find_files(sorted(data.iterdir()))
    with pytest.raises(DataError, match=r"has no split dev2, only .*train \(1 files\)"):
        find_files([data], split=["dev2"])
    assert find_files([data / "test-00000-of-00001.parquet"]).files  # named by the user
    (tmp_path / "folders" / "val").mkdir(parents=True)
    write_tar(tmp_path / "folders" / "val" / "0.tar", [("0.txt", b"a")])
    for place in ("folders", "folders/*/*.tar"):
        with pytest.raises(DataError, match=r"no split train, only validation"):
            find_files([tmp_path / place])
    (data / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"holds no split train, only .*--split"):
        find_files([data])
    for parts, split in (
        (("train_sft-00000-of-00002.parquet",), "train"),
        (("latest.parquet",), None),
        (("dev", "0.tar"), "validation"),
        (("val", "train2014.json"), "train"),
        (("coco_val2017.json",), "validation"),
        (("testing", "data", "0.tar"), "test"),
    ):
        assert split_of(parts) == split, parts


def test_files_of_a_folder(tmp_path):
    def found(*names, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "loop").symlink_to(folder)
        result = find_files([folder], **options)
        return [os.path.relpath(file, folder) for file in result.files], result.notes

    assert found("0.tar", "0.parquet", "0_stats.json")[0] == ["0.tar"]  # img2dataset
    assert found("a/0.parquet", "b/0.parquet", ".cache/c.parquet", "dataset_info.json")[0] == [
        "a/0.parquet",
        "b/0.parquet",
    ]
    assert found("llava.json", "images/0.jpg")[0] == ["llava.json"]
    assert found("0.TAR", "1.tar.gz", "2.tgz")[0] == ["0.TAR", "1.tar.gz", "2.tgz"]
    notes = found("train-00000-of-00003.parquet", "train-00002-of-00003.parquet")[1]
    assert notes[0].text == "only 2 of 3 parts are there"
    for names, reason in (
        (("a.json", "b.json"), "several files of records"),
        (("a.tar", "b.parquet"), "several kinds"),
        (("metadata.csv", "metadata.jsonl"), "several metadata files"),
        (("data-00000-of-00001.arrow",), "to_parquet"),
        (("images/0.jpg",), "file_name and text"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            found(*names)
        assert "\n" not in str(caught.value)


def test_globs_and_braces(tmp_path):
    for number in range(3):
        record = json.dumps({"caption": str(number)}).encode()
        write_tar(tmp_path / f"{number:03d}.tar", [("k.json", record)])
    for number, path in enumerate(("*.tar", "{000..002}.tar", "{000,001,002}.tar", "00[0-2].tar")):
        make(str(tmp_path / path), tmp_path / f"out{number}")
        assert captions(tmp_path / f"out{number}") == ["0", "1", "2"]
        index([str(tmp_path / path)], tmp_path / f"index{number}")
        assert captions(tmp_path / f"index{number}") == ["0", "1", "2"]
    with pytest.raises(DataError, match="matches no file"):
        find_files([str(tmp_path / "*.parquet")])


def test_one_line_for_what_cannot_be_done(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("k.txt", b"a cat")])
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    (tmp_path / "cut.tar.gz").write_bytes(packed.read_bytes()[:-30])
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd0000000000")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "lfs.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "utf16.jsonl").write_text('{"caption": "x"}', encoding="utf-16")
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "commas.csv").write_text("file_name,text\na.jpg,one, two\n")
    for call, reason in (
        (lambda: index([packed], tmp_path / "o"), r"compressed \(gzip\).*make shards"),
        (lambda: make(tmp_path / "cut.tar.gz", tmp_path / "o"), "does not decompress"),
        (lambda: make(tmp_path / "a.tar.zst", tmp_path / "o", input_format="webdataset"), "zstand"),
        (lambda: open_input([tmp_path / "a.jsonl.gz"]), "decompress it"),
        (lambda: open_input([tmp_path / "lfs.parquet"]), "git lfs pull"),
        (lambda: open_input([tmp_path / "utf16.jsonl"]), "UTF-16"),
        (lambda: open_input([tmp_path / "coco.json"]), "it holds images, annotations"),
        (lambda: open_input([tmp_path / "commas.csv"]), "in quotes"),
        (lambda: open_input(["s3://bucket/a.parquet"]), "copy it to one"),
        (lambda: make(tar, tmp_path.joinpath("s3://b/c").relative_to(tmp_path)), "object store"),
        (lambda: index([tar], tmp_path.joinpath("s3://b/c").relative_to(tmp_path)), "aws s3 sync"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            call()
        assert "\n" not in str(caught.value)


TARS = {
    # name: (members, captions read, kind of the fault or None)
    "json of metadata": (
        [("0.jpg", 1), ("0.json", b'{"width": 3}'), ("0.txt", b"\xef\xbb\xbfa"),
         ("1.jpg", 2), ("1.json", b'{"caption": "b", "sha256": "0"}'), ("1.txt", b"b"),
         ("2.jpg", 2), ("2.txt", b"{c")],
        ["a", "b", "{c"], None,
    ),
    "a folder, a hidden file, a README": (
        [("v1.0/", None), ("v1.0/0.txt", b"a"), ("._0.jpg", b"Mac"), ("README.md", b"x"),
         ("LICENSE.txt", b"MIT")],
        ["a"], None,
    ),
    "dots": (
        [("shot.v1.0.jpg", 1), ("shot.v1.0.txt", b"a"), ("shot.v1.1.jpg", 1),
         ("shot.v1.1.txt", b"b"), ("good.txt", b"c")],
        ["c"], {"dotted_key": 2},
    ),
    "one dotted text": (
        [("0.jpg", 1), ("0.caption.txt", b"a"), ("0.meta.json", b"{}")], ["a"], None,
    ),
    "two dotted texts": (
        [("0.jpg", 1), ("0.blip.txt", b"a"), ("0.alt.txt", b"b"), ("1.txt", b"c")],
        ["c"], {"missing_caption": 1},
    ),
    "image under no suffix": ([("0.txt", b"a"), ("1", 1)], ["a"], {"record": 1}),
    "image under an unknown suffix": ([("0.txt", b"a"), ("0.img", 1)], ["a"], None),
    "every suffix": (
        [(f"0.{n}.{s}", 1) for n, s in enumerate(("JPG", "jpe", "jfif", "jp2", "avif", "tga"))]
        + [("0.txt", b"a")],
        ["a"], None,
    ),
    "image not in the tar": (
        [("0.json", b'{"caption": "a", "url": "http://x/0.jpg"}'), ("1.txt", b"b")],
        ["b"], {"missing_image": 1},
    ),
    "array for an image": ([("0.txt", b"a"), ("0.npy", b"x"), ("1.txt", b"b")], ["b"],
                           {"missing_image": 1}),
    "text under another suffix": ([("0.caption", b"a"), ("0.jpg", 1), ("1.txt", b"b")], ["b"],
                                  {"missing_caption": 1}),
    "junk behind the end": ([("0.txt", b"a")], ["a"], {"damaged_tar": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_tars_are_read_and_indexed_alike(tmp_path, name):
    members, expected, kinds = TARS[name]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member.rstrip("/"))
            if data is None:
                info.type = tarfile.DIRTYPE
            data = PICTURES[f"{data}.jpg"] if isinstance(data, int) else data or b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if name == "junk behind the end":
        with open(tmp_path / "a.tar", "ab") as file:
            file.write(b"x" * 700)
    reports = (
        make(tmp_path / "a.tar", tmp_path / "made"),
        index([tmp_path / "a.tar"], tmp_path / "i"),
    )
    for report, folder in zip(reports, ("made", "i"), strict=True):
        assert captions(tmp_path / folder) == expected
        assert report.num_skipped == (kinds or {})
        num_images = sum(isinstance(d, int) for m, d in members if m.split(".")[0] == "0")
        if kinds is None:
            assert len(samples(tmp_path / folder)[0][1]) == num_images
    assert samples(tmp_path / "made") == samples(tmp_path / "i")


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


def test_rules_reach_members(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", PICTURES["0.jpg"]), ("0.mask.png", jpeg(1)),
                                         ("0.json", b'{"headline": "x"}')])  # fmt: skip
    rules = FieldRules.parse(["headline=caption"], ["mask.png"])
    report = make(tar, tmp_path / "out", rules=rules)
    assert (report.num_images, captions(tmp_path / "out")) == (1, ["x"])
