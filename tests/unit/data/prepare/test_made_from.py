"""A rerun keeps exactly the shards whose records, images, options and rules are the same."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_croc.data.prepare import made_from, preprocess
from megatron_croc.data.prepare.preprocess import Preprocessor
from megatron_croc.data.prepare.tar_index import TarIndexer
from megatron_croc.data.store.manifest import verify_shards
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError
from tests.unit.data.small_samples import conversation, jpeg, measure_lengths


@pytest.fixture
def source(tmp_path) -> Path:
    """Six records of an image each, for three shards."""
    (tmp_path / "img").mkdir()
    records = []
    for number in range(6):
        (tmp_path / "img" / f"{number}.jpg").write_bytes(jpeg(number))
        records.append({"image": f"{number}.jpg", "conversations": conversation(number, 1)})
    (tmp_path / "in.json").write_text(json.dumps(records))
    return tmp_path


def open_job(source: Path, images: str = "img") -> Preprocessor:
    return Preprocessor(
        input_path=source / "in.json",
        image_folder=source / images,
        output=source / "out",
        samples_per_shard=2,
    )


def rerun(source: Path, *, images: str = "img"):
    """Run the command; return (shards made, note or an empty text, report)."""
    job = open_job(source, images)
    made = job._job.unfinished_shards()
    list(job.make_shards(1))
    return made, job.note or "", job.finish()


def is_fresh(source: Path) -> bool:
    """True if the folder holds the bytes of a first run."""
    verify_shards(source / "out")
    kept = (source / "out").rename(source / "kept")
    rerun(source)
    fresh = {p.name: p.read_bytes() for p in (source / "out").iterdir() if p.is_file()}
    shutil.rmtree(source / "out")
    kept.rename(source / "out")
    return fresh == {p.name: p.read_bytes() for p in (source / "out").iterdir() if p.is_file()}


def test_images_decide(source):
    (source / "img" / "3.jpg").rename(source / "later.jpg")
    made, note, report = rerun(source)
    assert (made, note, report.num_skipped) == ([0, 1, 2], "", {"missing_image": 1})
    assert rerun(source)[:2] == ([], "")
    # The image comes late: its record is tried again, the other shards are kept.
    (source / "later.jpg").rename(source / "img" / "3.jpg")
    made, note, report = rerun(source)
    assert made == [1] and report.num_skipped == {} and report.num_samples == 6
    assert "1 of 3 shard(s)" in note and "3.jpg is there now" in note
    assert is_fresh(source)
    # Another picture of the same size, a little later.
    path = source / "img" / "0.jpg"
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(0, before.st_mtime_ns + 1))
    made, note, report = rerun(source)
    assert made == [0] and report.num_skipped == {"image": 1} and "0.jpg has changed" in note
    path.unlink()
    assert "0.jpg is gone" in rerun(source)[1]


def test_the_corrected_image_folder_is_used(source):
    (source / "wrong").mkdir()
    with pytest.raises(DataError, match="not one of 6 records"):
        rerun(source, images="wrong")
    made, note, report = rerun(source)
    assert made == [0, 1, 2] and report.num_samples == 6
    assert "the image folder was" in note and "\n" not in note
    shutil.copytree(source / "img", source / "copy")  # equal sizes and times, another folder
    assert rerun(source, images="copy")[0] == [0, 1, 2]


def test_records_decide(source, tokenizer_model):
    rerun(source)
    measure_lengths(str(source / "out"), tokenizer_model)
    records = json.loads((source / "in.json").read_text())
    (source / "in.json").write_text(json.dumps(records, indent=1))  # the same records
    assert rerun(source)[:2] == ([], "")
    assert rerun(source)[:2] == ([], "")
    assert list((source / "out").glob("lengths-*"))
    records[5]["conversations"] = conversation(77, 1)
    records += [{"conversations": conversation(6, 0)}]
    (source / "in.json").write_text(json.dumps(records))
    made, note, report = rerun(source)
    assert made == [2, 3] and report.num_samples == 7
    assert "1 of 4 shard(s)" in note and "records of the input have changed" in note
    assert "croc data lengths" in note and not list((source / "out").glob("lengths-*"))
    assert ShardedDataset(source / "out").read(5).conversations == conversation(77, 1)
    (source / "in.json").write_text(json.dumps(records[:3]))
    made, note, report = rerun(source)
    assert made == [1] and report.num_samples == 3 and "3 of 4 shard(s)" in note
    assert not list((source / "out").glob("shard-00000[23]*"))
    assert is_fresh(source)


def test_rules_decide(source, monkeypatch):
    rerun(source)
    monkeypatch.setattr(preprocess, "RULES", preprocess.RULES + 1)
    made, note, _ = rerun(source)
    assert made == [0, 1, 2] and "of the rules made them" in note


def test_an_interrupted_redo_goes_on(source):
    """Between dropping and remaking the folder is unfinished, never a mix of old and new."""
    rerun(source)
    for number in (0, 5):
        (source / "img" / f"{number}.jpg").write_bytes(jpeg(100 + number))
    next(open_job(source).make_shards(1))
    with pytest.raises(DataError, match="holds no finished dataset"):
        ShardedDataset(source / "out")
    assert rerun(source)[0] == [2]
    assert is_fresh(source)


def test_a_folder_of_an_older_version_is_kept_and_named(source):
    rerun(source)
    shutil.rmtree(source / "out" / "made_from")
    made, note, report = rerun(source)
    assert made == [] and report.num_samples == 6
    assert "does not say which files it was made from" in note


def test_a_replaced_tar_is_indexed_again(source):
    rerun(source)
    tars = sorted((source / "out").glob("*.tar"))

    def index() -> tuple[str, int]:
        job = TarIndexer(input_path=tars, output=source / "index")
        number = len(list(job.make_indices(1)))
        job.finish()
        return job.note or "", number

    assert index() == ("", 3)
    assert index() == ("", 0)
    content = bytearray(tars[1].read_bytes())
    content[600] ^= 1  # of equal size
    tars[1].write_bytes(content)
    note, number = index()
    assert number == 1 and "shard-000001.tar has changed" in note
    assert all(tar.exists() for tar in tars)


@pytest.mark.parametrize("damage", [b"[" * 100_000, b"[]", b"{}", b"\xff", b""])
def test_damaged_files_of_a_job_are_named_or_made_again(source, damage):
    rerun(source)
    folder = source / "out" / made_from.FOLDER
    for path in (folder / "shard-000001.made", folder / "shard-000001.files.gz"):
        (source / "out" / "manifest.json").unlink(missing_ok=True)
        path.write_bytes(damage)
        made, _, report = rerun(source)
        assert made == [1] and report.num_samples == 6
    assert is_fresh(source)
    for path in (source / "out" / "report.json", folder / made_from._JOB):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=f"{path.name} is damaged: remove the folder"):
            rerun(source)
