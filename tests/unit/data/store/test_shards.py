"""Stored samples are read back; damaged and unfinished folders are refused by name."""

import gc
import hashlib
import io
import json
import os
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.store import shards as shards_module
from megatron_croc.data.store.manifest import count_samples, read_manifest, verify_shards
from megatron_croc.data.store.shard_writer import ShardWriter, _header, write_manifest
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError


def record(number):
    return {"conversations": [{"from": "human", "value": f"question {number}"}], "id": number}


def images(number):
    return [("jpg", bytes([number, i]) * (100 + number)) for i in range(number % 3)]


def write(folder, sizes=(3, 0, 4), first=0):
    folder.mkdir(parents=True)
    infos, number = [], first
    for shard, size in enumerate(sizes):
        with ShardWriter(folder, shard) as writer:
            for _ in range(size):
                writer.add(record(number), images(number))
                number += 1
        infos.append(writer.info)
    write_manifest(folder, infos)
    return folder


def test_round_trip_in_any_order(tmp_path):
    dataset = ShardedDataset([write(tmp_path / "a"), write(tmp_path / "b", first=7)])
    assert len(dataset) == 14
    for number in np.random.default_rng(0).permutation(14).tolist() * 2:
        sample = dataset.read(number)
        assert sample.conversations == record(number)["conversations"]
        assert sample.image_bytes == [data for _, data in images(number)]
    assert dataset.read(3).sample_id == "a/000002-000000"
    assert len({dataset.read(i).sample_id for i in range(14)}) == 14
    with pytest.raises(IndexError):
        dataset.read(14)


def test_counts_come_from_the_manifest_alone(tmp_path):
    folder = write(tmp_path / "a")
    for path in folder.glob("shard-*"):
        path.unlink()
    assert count_samples((folder, folder)) == 14
    manifest = read_manifest(folder)
    assert (manifest.num_samples, manifest.num_images, manifest.num_text_only) == (7, 6, 3)


def test_tars_are_plain_webdataset(tmp_path):
    folder = write(tmp_path / "a", sizes=(4,))
    tar = folder / "shard-000000.tar"
    with tarfile.open(tar) as opened:
        assert opened.getnames()[:3] == [
            "000000-000000.json",
            "000000-000001.json",
            "000000-000001.0.jpg",
        ]
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"000000-{i:06d}" for i in range(4)]
    assert json.loads(samples[2]["json"]) == record(2)
    assert samples[2]["1.jpg"] == images(2)[1][1]


def test_a_tar_is_what_tarfile_writes(tmp_path):
    """Headers are filled in by hand, which is cheaper; sizes at the borders of a block and of 11
    digits are those of tarfile too."""
    folder = write(tmp_path / "a", sizes=(4,))
    tar = folder / "shard-000000.tar"
    again = io.BytesIO()
    with (
        tarfile.open(tar) as stored,
        tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for member in stored:
            copy = tarfile.TarInfo(member.name)
            copy.size = member.size
            new.addfile(copy, stored.extractfile(member))
    assert tar.read_bytes() == again.getvalue()
    (info,) = read_manifest(folder).shards
    assert info.tar_sha256 == hashlib.sha256(again.getvalue()).hexdigest()
    assert info.tar_bytes == len(again.getvalue())
    for size in (0, 511, 512, 8**11 - 1):
        member = tarfile.TarInfo("a.0.jpg")
        member.size = size
        assert _header("a.0.jpg", size) == member.tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(DataError, match=r"member a.0.jpg has \d+ bytes: .* less than 8 GiB"):
        _header("a.0.jpg", 8**11)


def test_equal_samples_give_equal_bytes(tmp_path):
    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}

    assert digests(write(tmp_path / "a")) == digests(write(tmp_path / "b"))


def test_same_folder_names_are_told_apart(tmp_path):
    folders = [write(tmp_path / "x" / "train"), write(tmp_path / "y" / "train")]
    dataset = ShardedDataset(folders)
    assert dataset.read(0).sample_id == "x/train/000000-000000"
    assert dataset.read(7).sample_id == "y/train/000000-000000"
    with pytest.raises(DataError, match="twice"):
        ShardedDataset([folders[0], folders[0]])


def test_threads_share_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_FILES", 2)
    dataset = ShardedDataset(write(tmp_path / "a", sizes=(2,) * 20))
    order = np.random.default_rng(0).integers(0, 40, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for number, sample in zip(order, pool.map(dataset.read, order), strict=True):
            assert sample.image_bytes == [data for _, data in images(number)]
    assert len(dataset._files._files) <= 2


def test_files_are_closed_with_the_last_reference(tmp_path):
    """Without the collector of cycles, which may come after hundreds of validations."""
    folder = write(tmp_path / "a")
    gc.collect()
    gc.disable()
    try:
        open_before = os.listdir("/proc/self/fd")
        dataset = ShardedDataset(folder)
        dataset.read(0)
        dataset.read(5)
        assert len(os.listdir("/proc/self/fd")) > len(open_before)
        del dataset
        assert os.listdir("/proc/self/fd") == open_before
    finally:
        gc.enable()


def test_headers_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """Python 3.11.7's own parser is not made for threads."""
    dataset = ShardedDataset(write(tmp_path / "a", sizes=(1,) * 40))
    free, load = threading.Lock(), np.load

    def load_alone(*args, **kwargs):
        assert free.acquire(blocking=False), "two at once"
        time.sleep(0.001)
        free.release()
        return load(*args, **kwargs)

    monkeypatch.setattr(np, "load", load_alone)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(dataset.read, range(40)))) == 40


def test_short_reads_are_continued(tmp_path, monkeypatch):
    dataset = ShardedDataset(write(tmp_path / "a"))
    whole, real_pread = dataset.read(5), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: real_pread(file, min(size, 7), at))
    assert dataset.read(5) == whole
    assert whole.image_bytes


def test_unfinished_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none is missing.*croc data preprocess"):
        ShardedDataset(tmp_path / "none")
    folder = write(tmp_path / "a")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest.json.*goes on where it stopped"):
        ShardedDataset(folder)
    with pytest.raises(DataError, match="data_path is empty"):
        ShardedDataset(())


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: m.update(format="other"), "no manifest of"),
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m.pop("num_images"), "num_images"),
        (lambda m: m["shards"][0].pop("tar_sha256"), "tar_sha256"),
        (lambda m: m.update(num_samples=8), "contradicts itself"),
        (lambda m: m["shards"][0].update(name="../shard-000000"), "contradicts itself"),
    ],
)
def test_foreign_manifests_are_refused(tmp_path, edit, reason):
    path = write(tmp_path / "a") / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=reason):
        read_manifest(tmp_path / "a")
    path.write_text("{")
    with pytest.raises(DataError, match="not readable"):
        read_manifest(tmp_path / "a")


def test_damaged_shards_are_refused(tmp_path):
    folder = write(tmp_path / "index")
    index = folder / "shard-000000.idx.npy"
    damaged = bytearray(index.read_bytes())
    damaged[-1] ^= 1
    index.write_bytes(damaged)
    with pytest.raises(DataError, match=r"shard-000000\.idx\.npy is not the index"):
        ShardedDataset(folder)

    tar = write(tmp_path / "tar") / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"shard-000002\.tar has 1000 bytes"):
        ShardedDataset(tmp_path / "tar")

    (write(tmp_path / "gone") / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        ShardedDataset(tmp_path / "gone")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda rows: rows[1:], id="first sample missing"),
        pytest.param(lambda rows: rows[rows[:, 0] != 1], id="middle sample missing"),
        pytest.param(lambda rows: rows[rows[:, 0] != 2], id="last sample missing"),
        pytest.param(lambda rows: rows[:0], id="all missing"),
        pytest.param(lambda rows: rows[[0, 1, 0, 1, 3]], id="out of order"),
        pytest.param(lambda rows: np.add(rows, [1, 0, 0]), id="numbered from 1"),
        pytest.param(lambda rows: np.add(rows, [0, -513, 0]), id="before the tar"),
        pytest.param(lambda rows: [*rows, rows[-1] + [1, 0, 0]], id="one sample more"),
    ],
)
def test_an_index_of_other_samples_is_refused(tmp_path, change):
    """Though it is the one its manifest names: whoever wrote both was wrong."""
    folder = write(tmp_path / "a")
    index = folder / "shard-000000.idx.npy"
    rows = np.load(index)
    assert rows[:, 0].tolist() == [0, 1, 1, 2, 2, 2]
    np.save(index, change(rows))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["idx_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    manifest["shards"][0]["idx_bytes"] = index.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"idx\.npy does not fit the samples of .*000000\.tar"):
        ShardedDataset(folder)


def test_a_tar_cut_while_reading_is_refused(tmp_path):
    folder = write(tmp_path / "a")
    dataset = ShardedDataset(folder)
    tar = folder / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(DataError, match=r"sample a/000002-000001: .*shard-000002\.tar ends inside"):
        dataset.read(4)


def test_damaged_content_is_found(tmp_path):
    folder = write(tmp_path / "a")
    verify_shards(folder)
    dataset = ShardedDataset(folder)
    tar = folder / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[512] ^= 0xFF  # the first byte of the first sample's JSON
    tar.write_bytes(content)
    with pytest.raises(BadSampleError, match="a/000000-000000") as caught:
        dataset.read(0)
    assert caught.value.kind == "record"
    dataset.read(1)
    with pytest.raises(DataError, match=r"shard-000000\.tar is not the file"):
        verify_shards(folder)


def test_an_error_leaves_no_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 0) as writer:
        writer.add(record(0), [])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
