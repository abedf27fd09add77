"""One interface over disk and object store; the cache stays small, right and shared."""

import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.prepare.tar_index import TarIndexer
from megatron_croc.data.store import storage, storage_cache
from megatron_croc.data.store.manifest import verify_shards
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.data.store.storage import (
    LocalFile,
    join_location,
    open_storage,
    read_whole,
    retry,
)
from megatron_croc.data.store.storage_cache import StorageCache
from megatron_croc.errors import DataError


@pytest.fixture(scope="module")
def server():
    """A local S3 server and a client of it."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage._s3_client.cache_clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
        storage._s3_client.cache_clear()
    server.stop()


@pytest.fixture
def bucket_copy(server, make_dataset):
    """A dataset folder and its copy in the bucket."""

    def copy(num_samples: int, name: str) -> tuple[str, str]:
        folder = make_dataset(num_samples, name=name)
        for path in Path(folder).iterdir():
            server.upload_file(str(path), "bucket", f"{name}/{path.name}")
        return folder, f"s3://bucket/{name}"

    return copy


def test_prefixes_and_globs_of_tars(server, make_dataset, tmp_path):
    folder = Path(make_dataset(12, name="parts"))
    for path in folder.glob("*.tar"):
        server.upload_file(str(path), "bucket", f"tars/{path.name}")
    server.put_object(Bucket="bucket", Key="tars/README.md", Body=b"x")
    places = ("tars", "tars/", "tars/*.tar", "tars/shard-{000000..000002}.tar")
    first = ShardedDataset(folder).read(0).image_bytes
    for number, place in enumerate(places):
        job = TarIndexer(input_path=[f"s3://bucket/{place}"], output=tmp_path / str(number))
        list(job.make_indices(1))
        assert job.finish().num_samples == 12, place
        assert ShardedDataset(tmp_path / str(number)).read(0).image_bytes == first
    made = Preprocessor(
        input_path="s3://bucket/tars/",
        image_folder=None,
        output=tmp_path / "made",
        samples_per_shard=20,
    )
    list(made.make_shards(1))
    assert made.finish().num_samples == 12
    for place, reason in (("none/*.tar", "matches no object"), ("none/", "holds no")):
        with pytest.raises(DataError, match=reason):
            TarIndexer(input_path=[f"s3://bucket/{place}"], output=tmp_path / "none")


def samples_of(dataset):
    return [dataset.read(i) for i in range(len(dataset))]


def digest_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


class Memory:
    """A storage that counts its reads, and may fail."""

    def __init__(self, data: bytes, failures: int = 0) -> None:
        self.location, self.data, self.failures, self.reads = "memory", data, failures, 0

    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        if self.failures:
            self.failures -= 1
            raise OSError("connection lost")
        return self.data[offset : offset + length]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.0)


def test_object_store_equals_disk(bucket_copy, tmp_path):
    folder, url = bucket_copy(12, "equal")
    local = samples_of(ShardedDataset(folder))
    assert samples_of(ShardedDataset(url)) == local
    cache = StorageCache(tmp_path / "cache", 10**9)
    assert samples_of(ShardedDataset(url, cache=cache)) == local
    tars = sorted(Path(folder).glob("*.tar"))
    cached = [path for path in (tmp_path / "cache").iterdir() if path.name != ".lock"]
    assert sorted(path.name for path in cached) == sorted(digest_of(t.read_bytes()) for t in tars)
    verify_shards(url)
    assert TarIndexer(input_path=[f"{url}/{tars[0].name}"], output=tmp_path / "i").sizes == [
        tars[0].stat().st_size
    ]


def test_tars_of_an_object_store_are_indexed_in_place(bucket_copy, tmp_path):
    folder, url = bucket_copy(7, "indexed")
    job = TarIndexer(
        input_path=[f"{url}/shard-{i:06d}.tar" for i in range(2)], output=tmp_path / "index"
    )
    list(job.make_indices(1))
    assert job.finish().num_samples == 7
    found = samples_of(ShardedDataset(tmp_path / "index"))
    expected = samples_of(ShardedDataset(folder))
    assert [s.image_bytes for s in found] == [s.image_bytes for s in expected]
    assert [s.conversations for s in found] == [s.conversations for s in expected]


def test_errors_of_an_object_store_name_the_url(server, bucket_copy, monkeypatch):
    _, url = bucket_copy(3, "errors")
    with pytest.raises(FileNotFoundError, match=f"{url}/none"):
        open_storage(f"{url}/none").size()
    with pytest.raises(DataError, match="no manifest"):
        ShardedDataset("s3://bucket/nothing")
    with pytest.raises(DataError, match="write s3://bucket/key"):
        open_storage("s3://bucket")
    tar = open_storage(f"{url}/shard-000000.tar")
    with pytest.raises(DataError, match="ends"):
        tar.read(tar.size() - 5, 10)
    with pytest.raises(DataError, match="ends before"):
        tar.read(tar.size() + 5, 10)
    dataset = ShardedDataset(url)
    dataset.read(0)  # the index is here now
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    storage._s3_client.cache_clear()
    with pytest.raises(OSError, match=f"{url}/shard-000000.tar: .*127.0.0.1:9"):
        dataset.read(0)
    storage._s3_client.cache_clear()


def test_errors_are_retried_then_believed():
    memory = Memory(b"abc", failures=storage.ATTEMPTS - 1)
    assert retry(lambda: memory.read(0, 3), "memory") == b"abc"
    memory.failures = storage.ATTEMPTS
    with pytest.raises(OSError, match="connection lost"):
        retry(lambda: memory.read(0, 3), "memory")
    assert memory.reads == 2 * storage.ATTEMPTS
    calls = []
    with pytest.raises(FileNotFoundError):
        retry(lambda: calls.append(0) or LocalFile("/none/such"), "file")
    assert len(calls) == 1


def test_local_files_are_read_exactly(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert LocalFile(path).read(3, 4) == b"3456"
    assert read_whole(path) == b"0123456789"
    with pytest.raises(DataError, match=r"file ends inside the 4 bytes at 8"):
        LocalFile(path).read(8, 4)


def test_locations_join():
    assert join_location("/a/b", "c") == "/a/b/c"
    assert join_location("/a/b", "/c") == "/c"
    assert join_location("s3://x/y/", "c") == "s3://x/y/c"
    assert join_location("/a", "s3://x/c") == "s3://x/c"


def test_cache_is_bounded_and_forgets_the_oldest(tmp_path, monkeypatch):
    cache = StorageCache(tmp_path, 250)
    remotes = [Memory(bytes([i]) * 100) for i in range(4)]

    def use(i):
        opened = cache.open(remotes[i], digest=digest_of(remotes[i].data), size=100)
        assert opened.read(0, 100) == remotes[i].data
        return isinstance(opened, LocalFile)

    def kept():
        return {i for i in range(4) if (tmp_path / digest_of(remotes[i].data)).exists()}

    assert use(0)
    assert use(1)
    assert not use(2)  # both were used just now: the third is read from afar
    assert kept() == {0, 1}
    monkeypatch.setattr(storage_cache, "KEEP_SECONDS", 0.0)
    os.utime(tmp_path / digest_of(remotes[0].data), (1, 1))
    assert use(2)
    assert kept() == {1, 2}
    reads = remotes[1].reads
    assert use(1)
    assert remotes[1].reads == reads
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 250
    assert not list(tmp_path.glob(".*.part"))


def test_cache_refuses_wrong_bytes(tmp_path):
    cache = StorageCache(tmp_path, 1000)
    with pytest.raises(DataError, match="memory is not the file that was written"):
        cache.open(Memory(b"wrong"), digest=digest_of(b"right"), size=5)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_cache_retries_a_download(tmp_path):
    remote = Memory(b"x" * 10, failures=2)
    opened = StorageCache(tmp_path, 1000).open(remote, digest=digest_of(b"x" * 10), size=10)
    assert opened.read(0, 10) == b"x" * 10


def test_a_killed_download_is_cleaned_up(tmp_path):
    abandoned = tmp_path / ".0000.part"
    abandoned.write_bytes(b"y" * 900)
    opened = StorageCache(tmp_path, 1000).open(
        Memory(b"x" * 500), digest=digest_of(b"x" * 500), size=500
    )
    assert isinstance(opened, LocalFile)
    assert not abandoned.exists()


def test_threads_download_once(tmp_path):
    remote = Memory(b"x" * 1000)
    cache = StorageCache(tmp_path, 10_000)
    with ThreadPoolExecutor(8) as pool:
        opened = list(
            pool.map(
                lambda _: cache.open(remote, digest=digest_of(remote.data), size=1000), range(16)
            )
        )
    assert all(file.read(0, 1000) == remote.data for file in opened)
    assert remote.reads == 1


def _open_many(folder: str, source: str, results) -> None:
    cache = StorageCache(folder, 10_000)
    good = 0
    for path in sorted(Path(source).iterdir()) * 3:
        data = path.read_bytes()
        opened = cache.open(LocalFile(path), digest=digest_of(data), size=len(data))
        good += opened.read(0, len(data)) == data
    results.put(good)


def test_processes_share_a_cache(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(30):
        (source / f"{i:02d}").write_bytes(bytes([i]) * (500 + i))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_open_many, args=(str(tmp_path / "cache"), str(source), results))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [90, 90, 90]
    for worker in workers:
        worker.join()
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 10_000


def test_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    storage._s3_client.cache_clear()
    with pytest.raises(DataError, match=r"pip install -e '\.\[s3\]'"):
        open_storage("s3://bucket/key")
    storage._s3_client.cache_clear()


def test_a_moved_folder_keeps_its_index(make_dataset, tmp_path):
    folder = Path(make_dataset(7))
    (folder / "manifest.json").unlink()
    for path in folder.glob("*.npy"):
        path.unlink()
    job = TarIndexer(input_path=[folder], output=folder)
    list(job.make_indices(1))
    job.finish()
    shutil.move(folder, tmp_path / "elsewhere")
    assert len(samples_of(ShardedDataset(tmp_path / "elsewhere"))) == 7
