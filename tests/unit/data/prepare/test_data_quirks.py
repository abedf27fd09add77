"""Habits and faults of published datasets; docs/data_quirks.md names the source of each."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_croc.data.records.fields import FieldRules
from megatron_croc.data.sample.image_header import read_header
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.errors import DataError
from tests.unit.data.prepare.test_inputs import (
    PICTURES,
    captions,
    image_folder,
    index,
    make,
    picture,
    samples,
    told,
    write_parquet,
    write_tar,
)

A = PICTURES["1.jpg"]


def records(path, *rows):
    path.write_text(json.dumps(rows))
    return path


def test_llava_ocr_vqa(tmp_path):
    """Lists .jpg where the download gives .gif; some images are missing, some empty."""
    folder = image_folder(tmp_path)
    (folder / "782118577.gif").write_bytes(A)
    (folder / "empty.jpg").touch()
    names = ("782118577.jpg", "gone.jpg", "empty.jpg")
    path = records(tmp_path / "a.json", *({"image": n, "caption": n} for n in names))
    report = make(path, tmp_path / "out", image_folder=folder)
    assert (report.num_images, report.num_skipped) == (1, {"missing_image": 1, "image": 1})


def test_llava_cc3m_with_its_images_packed(tmp_path):
    """metadata.jsonl beside images.zip, and `file_name` beside `conversations`."""
    folder = tmp_path / "cc3m"
    folder.mkdir()
    (folder / "images.zip").touch()
    talk = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "ho"}]
    row = {"id": "GCC_1", "file_name": "1.jpg", "conversations": talk}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"unpack images\.zip there first"):
        make(folder, tmp_path / "out")
    image_folder(folder)
    (folder / "1.jpg").write_bytes(A)
    assert make(folder, tmp_path / "out2").num_images == 1


def test_one_metadata_file_for_several_splits(tmp_path):
    folder = tmp_path / "set"
    rows = []
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "1.jpg").write_bytes(A)
        rows.append({"file_name": f"{split}/1.jpg", "text": split})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = make(folder, tmp_path / "out")
    assert (captions(tmp_path / "out"), report.num_skipped) == (["train"], {"other_split": 1})
    make(folder, tmp_path / "both", split=["all"])
    assert captions(tmp_path / "both") == ["train", "test"]


def test_karpathy_split_in_the_records(tmp_path):
    rows = [{"caption": s, "split": s} for s in ("train", "restval", "val", "test")]
    report = make(records(tmp_path / "a.json", *rows), tmp_path / "out")
    assert captions(tmp_path / "out") == ["train", "restval"]
    assert "of split validation: --split validation asks for it" in told(report)
    tar = [(f"{n}.json", json.dumps(row).encode()) for n, row in enumerate(rows)]
    report = index([write_tar(tmp_path / "a.tar", tar)], tmp_path / "index")
    assert report.num_skipped == {"other_split": 2}


def test_two_image_fields_and_a_caption(tmp_path):
    """metadata1000.jsonl with `image` and `gaussian_padded_image`: a choice, not a guess."""
    folder = image_folder(tmp_path)
    row = {"caption": "x", "image": "1.jpg", "gaussian_padded_image": "2.jpg"}
    path = records(tmp_path / "a.json", row)
    with pytest.raises(DataError, match=r"image, gaussian_padded_image.*--ignore"):
        make(path, tmp_path / "out", image_folder=folder)
    rules = FieldRules.parse(ignore=["gaussian_padded_image"])
    make(path, tmp_path / "out2", image_folder=folder, rules=rules)
    assert samples(tmp_path / "out2")[0][1] == [A]


def test_img2dataset(tmp_path):
    """An image that failed leaves .txt and .json with its address; or an empty .txt."""
    meta = {"url": "http://x/a.jpg", "status": "success", "key": "0", "width": 3}
    members = [
        ("0.jpg", A),
        ("0.json", json.dumps(meta | {"caption": "a"}).encode()),
        ("0.txt", b"a"),
        ("1.json", json.dumps(meta | {"caption": "b"}).encode()),
        ("1.txt", b"b"),
        ("2.jpg", A),
        ("2.txt", b""),
    ]
    tar = write_tar(tmp_path / "00000.tar", members)
    write_parquet(tmp_path / "00000.parquet", [meta])
    (tmp_path / "00000_stats.json").write_text("{}")
    for report in (make(tmp_path, tmp_path / "out"), index([tar], tmp_path / "index")):
        assert report.num_skipped == {"missing_image": 1, "no_answer": 1}
    assert captions(tmp_path / "out") == captions(tmp_path / "index") == ["a"]


def test_names_of_members_in_webdataset(tmp_path):
    """Two words before the suffix, suffixes such as png_left, keys and folders with dots."""
    members = [
        ("0.input.jpg", A), ("0.outputs.txt", b"a"),
        ("1.png_left", A), ("1.png_right", PICTURES["2.jpg"]), ("1.txt", b"b"),
        ("22.0/2.jpg", A), ("22.0/2.txt", b"c"),
        ("22.05.png", A), ("22.05.txt", b"d"), ("22.06.png", A), ("22.06.txt", b"e"),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)
    reports = make(tar, tmp_path / "out"), index([tar], tmp_path / "i")
    for report, folder in zip(reports, ("out", "i"), strict=True):
        assert captions(tmp_path / folder) == ["a", "b", "c"]
        assert samples(tmp_path / folder)[1][1] == [A, PICTURES["2.jpg"]]
        assert report.num_skipped == {"dotted_key": 2}


def test_cauldron_mmmu_and_m3it(tmp_path):
    import base64

    turns = [{"user": "hi", "assistant": "ho", "source": "ai2d"}] * 2
    write_parquet(
        tmp_path / "ai2d" / "train-00000.parquet", [{"images": [picture(1)], "texts": turns}]
    )
    write_parquet(
        tmp_path / "mmmu" / "dev-00000.parquet",
        [{"question": "<image 2> or <image 1>?", "answer": "B", "options": "['a', 'b']",
          "image_1": picture(1), "image_2": picture(2), "image_3": None}],
    )  # fmt: skip
    m3it = {"instruction": "What?", "inputs": "", "outputs": "a"}
    m3it |= {"image_base64_str": [base64.b64encode(A).decode()]}
    (tmp_path / "m3it").mkdir()
    records(tmp_path / "m3it" / "train.json", m3it)
    make(tmp_path / "ai2d", tmp_path / "a")
    messages, _ = samples(tmp_path / "a")[0]
    assert [m["value"] for m in messages] == ["<image>\nhi", "ho", "hi", "ho"]
    make(tmp_path / "mmmu", tmp_path / "b", split=["dev"])
    assert samples(tmp_path / "b")[0][1] == [PICTURES["2.jpg"], A]
    make(tmp_path / "m3it", tmp_path / "c")
    assert (samples(tmp_path / "c")[0][1], captions(tmp_path / "c")) == ([A], ["a"])


def test_onevision_records_without_image_or_keys(tmp_path):
    """`image` is null in text-only rows; one row has messages of another form."""
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    rows = [{"image": None, "conversations": talk}, {"conversations": [{"markdown": "x"}]}]
    report = make(records(tmp_path / "a.json", *rows), tmp_path / "out")
    assert (report.num_text_only, report.num_skipped) == (1, {"roles": 1})
    assert "image is empty: a sample of text only (1 records)" in told(report)


def test_messages_without_marks(tmp_path):
    """llava-en-zh-2k as first published: `images`, and no <image> in any message."""
    folder = image_folder(tmp_path)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = records(tmp_path / "a.json", {"messages": chat, "images": ["1.jpg"]})
    with pytest.raises(DataError, match=r"0 <image> mark\(s\) for 1 image\(s\): write one"):
        make(path, tmp_path / "out", image_folder=folder)


def test_16_bits_are_not_clipped(tmp_path):
    """Grey of 16 bits keeps 256 levels, its high bytes, in every byte order."""
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    transform = ImageTransform(img_size=64, aspect_ratio="pad", fill=(0, 0, 0))
    for name, levels in (("a.png", ramp), ("a.tif", ramp), ("b.tif", ramp.astype(">u2"))):
        Image.fromarray(levels).save(tmp_path / name)
        pixels = transform.decode_with_pil((tmp_path / name).read_bytes())
        assert (pixels.numpy() == (ramp >> 8)[None]).all(), name
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="8 or 16 bits"):
        read_header((tmp_path / "f.tif").read_bytes())
