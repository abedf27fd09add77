"""Files of an input are chosen aloud: folders, splits, globs; what cannot be read is one line."""

import gzip
import json
import os

import pytest

from megatron_croc.data.prepare.inputs import open_input
from megatron_croc.data.prepare.inputs.files import find_files
from megatron_croc.data.records.splits import split_of
from megatron_croc.errors import DataError
from tests.unit.data.prepare.test_inputs import (
    captions,
    index,
    make,
    picture,
    told,
    write_parquet,
    write_tar,
)


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
