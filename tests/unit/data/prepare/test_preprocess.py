"""Preprocessing: what is skipped is said, what is finished is kept, equal input is equal bytes."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_croc.data.prepare import preprocess
from megatron_croc.data.prepare.inputs import open_input, text_files
from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.store.manifest import verify_shards
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError
from tests.unit.data.small_samples import conversation, jpeg

NUM_GOOD = 23


@pytest.fixture
def source(tmp_path):
    """A folder of images and a JSON file of good records."""
    images = tmp_path / "images"
    (images / "part").mkdir(parents=True)
    records = []
    for number in range(NUM_GOOD):
        num_images = number % 3
        names = [f"part/{number}_{i}.jpg" for i in range(num_images)]
        for i, name in enumerate(names):
            (images / name).write_bytes(jpeg(10 * number + i))
        record = {"id": f"r{number}", "conversations": conversation(number, num_images)}
        if names:
            record["image"] = names[0] if num_images == 1 else names
        records.append(record)
    path = tmp_path / "input.json"
    path.write_text(json.dumps(records))
    return path


def job(source, output, **options) -> Preprocessor:
    defaults = {"samples_per_shard": 5, "image_folder": source.parent / "images"}
    return Preprocessor(input_path=source, output=output, **defaults | options)


def run(source, output, num_workers=1, **options):
    preprocessor = job(source, output, **options)
    list(preprocessor.make_shards(num_workers))
    return preprocessor.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_every_good_record_arrives(source, tmp_path):
    report = run(source, tmp_path / "out")
    assert (report.num_records, report.num_samples, report.num_skipped) == (23, 23, {})
    assert (report.num_images, report.num_text_only) == (22, 8)
    dataset = ShardedDataset(tmp_path / "out")
    verify_shards(tmp_path / "out")
    for number in range(NUM_GOOD):
        sample = dataset.read(number)
        assert sample.conversations == conversation(number, number % 3)
        assert sample.image_bytes == [jpeg(10 * number + i) for i in range(number % 3)]


def test_workers_and_repetition_change_no_byte(source, tmp_path):
    run(source, tmp_path / "a")
    run(source, tmp_path / "b", num_workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not (tmp_path / "b" / ".progress").exists()


def test_skipped_records_are_reported(source, tmp_path):
    images = source.parent / "images"
    (images / "broken.jpg").write_bytes(b"not an image")
    asks = [{"from": "human", "value": "<image> what ?"}, {"from": "gpt", "value": "that"}]
    bad = {
        "record": "a string",
        "missing_image": {"image": "absent.jpg", "conversations": asks},
        "image": {"image": "broken.jpg", "conversations": asks},
        "no_answer": {"conversations": asks[:1]},
        "image_marks": {"conversations": asks},
        "roles": {"image": "part/1_0.jpg", "conversations": asks[::-1]},
    }
    records = json.loads(source.read_text())
    records[4:4] = bad.values()
    records.append({"image": "../input.json", "conversations": asks})
    source.write_text(json.dumps(records))
    report = run(source, tmp_path / "out")
    assert report.num_skipped == {kind: 1 for kind in bad} | {"missing_image": 2}
    assert report.num_samples == NUM_GOOD
    assert len(ShardedDataset(tmp_path / "out")) == NUM_GOOD
    by_record = {entry.record: entry for entry in report.skipped}
    assert [by_record[4 + i].kind for i in range(len(bad))] == list(bad)
    text = "\n".join(report.lines())
    assert "30 records: 23 samples" in text
    assert "record 5: image absent.jpg is not in the image folder" in text
    assert "image ../input.json lies outside the image folder" in text


def test_finished_shards_are_kept(source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole")
    first = job(source, tmp_path / "out")
    shards: Iterator[int] = first.make_shards(1)
    next(shards), next(shards)
    with pytest.raises(DataError, match="lacks 3 shard"):
        first.finish()
    with pytest.raises(DataError, match="goes on where it stopped"):
        ShardedDataset(tmp_path / "out")

    made = []
    real = preprocess._make_shard
    monkeypatch.setattr(preprocess, "_make_shard", lambda *a: made.append(a[1]) or real(*a))
    report = run(source, tmp_path / "out")
    assert made == [2, 3, 4]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert run(source, tmp_path / "out") == report
    assert made == [2, 3, 4]


def as_jsonl(records, folder):
    path = folder / "input.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n")
    return path


def as_tars(records, folder):
    for part in range(2):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for number, record in list(enumerate(records))[
                slice(10) if part == 0 else slice(10, None)
            ]:
                text = json.dumps({"conversations": record["conversations"]}).encode()
                members = {f"k{number:03d}.json": text}
                for i, name in enumerate(names_of(record)):
                    members[f"k{number:03d}.{i}.jpg"] = (folder / "images" / name).read_bytes()
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return [folder / "0.tar", folder / "1.tar"]


def as_parquet(records, folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "id": record["id"],
            "conversations": record["conversations"],
            "images": [
                {"bytes": (folder / "images" / name).read_bytes(), "path": name}
                for name in names_of(record)
            ],
        }
        for record in records
    ]
    (folder / "hub").mkdir()
    for part, some in enumerate((rows[:9], rows[9:])):
        table = pyarrow.Table.from_pylist(some)
        parquet.write_table(table, folder / "hub" / f"{part}.parquet", row_group_size=4)
    return folder / "hub"


def names_of(record):
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


@pytest.mark.parametrize("convert", [as_jsonl, as_tars, as_parquet])
def test_every_input_gives_the_same_samples(source, tmp_path, convert):
    path = convert(json.loads(source.read_text()), tmp_path)
    outputs = []
    for workers in (1, 2):
        preprocessor = Preprocessor(
            input_path=path,
            image_folder=source.parent / "images" if convert is as_jsonl else None,
            output=tmp_path / f"out{workers}",
            samples_per_shard=5,
        )
        assert preprocessor.num_unfinished == NUM_GOOD
        list(preprocessor.make_shards(workers))
        report = preprocessor.finish()
        assert (report.num_records, report.num_samples, report.num_skipped) == (23, 23, {})
        outputs.append(contents(tmp_path / f"out{workers}"))
    assert outputs[0] == outputs[1]
    dataset = ShardedDataset(tmp_path / "out1")
    for number in range(NUM_GOOD):
        sample = dataset.read(number)
        assert sample.conversations == conversation(number, number % 3)
        assert sample.image_bytes == [jpeg(10 * number + i) for i in range(number % 3)]


def test_slices_of_lines_begin_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "STRIDE", 4)
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"n": n}) if n != 6 else "{" for n in range(11)))
    opened = open_input([path])
    assert opened.num_records == 11
    found = [r for begin in range(0, 11, 3) for r in opened.slice(begin, min(begin + 3, 11)).read()]
    assert [r.number for r in found] == list(range(11))
    assert [r.record for r in found if r.number != 6] == [{"n": n} for n in range(11) if n != 6]
    assert found[6].fault is not None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.txt", b"", "give the format"),
        ("x.parquet", b"PAR1 no", "no readable parquet"),
        ("x.json", b"[" * 100_000, "not valid JSON"),
        ("x.jsonl", None, "cannot be read"),
        ("x.tar", None, "cannot be read"),
    ],
)
def test_unusable_files_are_one_line(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        open_input([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_captions_and_chats_are_understood(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, ({"caption": " a cat "}, {"messages": chat}))))
    run(path, tmp_path / "out", image_folder=None)
    dataset = ShardedDataset(tmp_path / "out")
    assert dataset.read(0).conversations[1] == {"from": "gpt", "value": "a cat"}
    assert dataset.read(1).conversations == [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "ho"},
    ]


@pytest.mark.parametrize("finished", [True, False])
def test_another_input_is_refused(source, tmp_path, finished):
    if finished:
        run(source, tmp_path / "out")
    else:
        next(job(source, tmp_path / "out").make_shards(1))
    with pytest.raises(DataError, match="samples_per_shard 5, now 7"):
        job(source, tmp_path / "out", samples_per_shard=7)
    other = source.with_name("other.json")
    other.write_text(source.read_text() + " ")
    with pytest.raises(DataError, match="begun with another input"):
        job(other, tmp_path / "out", image_folder=source.parent / "images")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not valid JSON"), ("{}", "must be a JSON list, got dict"), ("[]", "input is empty")],
)
def test_unusable_input_is_one_line(source, tmp_path, text, reason):
    source.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        run(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(source, tmp_path):
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        Preprocessor(
            input_path=tmp_path / "none.json",
            image_folder=tmp_path,
            output=tmp_path / "out",
            samples_per_shard=5,
        )
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        Preprocessor(
            input_path=source,
            image_folder=tmp_path / "none",
            output=tmp_path / "out",
            samples_per_shard=5,
        )


def test_command(source, tmp_path):
    root = Path(__file__).parents[4]
    command = [sys.executable, str(root / "tools" / "preprocess_data.py")]
    command += ["--input", str(source), "--image-folder", str(source.parent / "images")]
    command += ["--output", str(tmp_path / "out"), "--samples-per-shard", "10"]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "23 records: 23 samples" in done.stdout
    assert len(ShardedDataset(tmp_path / "out")) == NUM_GOOD
    tars = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    again = [sys.executable, str(root / "tools" / "preprocess_data.py"), "--index", "--input"]
    again += [*tars, "--output", str(tmp_path / "index"), "--workers", "2"]
    done = subprocess.run(again, capture_output=True, text=True, env=environment, check=True)
    assert "MB/s" in done.stdout
    indexed, made = ShardedDataset(tmp_path / "index"), ShardedDataset(tmp_path / "out")
    for i in range(NUM_GOOD):
        assert indexed.read(i).conversations == made.read(i).conversations
        assert indexed.read(i).image_bytes == made.read(i).image_bytes
    source.write_text("{")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
