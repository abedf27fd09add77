"""A look counts what is planted, shows it as the model sees it, and tells what has changed."""

import io
import json
import re

import pytest
from PIL import Image

from megatron_croc.cli.data import check
from megatron_croc.cli.main import main
from megatron_croc.data.look.facts import _kind_of
from megatron_croc.data.look.survey import choose_samples
from megatron_croc.errors import DataError
from tests.unit.data.small_samples import conversation, jpeg


def ask(text: str, answer: str = "a thing") -> list[dict]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def picture(width: int, height: int) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "PNG")
    return "png", buffer.getvalue()


RECORDS = {
    4: (ask("<image>\n" + "what " * 700), [("jpg", jpeg(4))]),  # the answer is cut off
    9: (ask("<image> what ?", "a thing " * 250), [("jpg", jpeg(9))]),  # a part of it is
    12: (conversation(8, 1), [("jpg", jpeg(80))]),  # sample 8 once more
    13: (ask("<image> what ?", "\u0434\u0430 \u0432\u0435\u0449\u044c"), [("jpg", jpeg(13))]),
    16: (ask("<image> what ?"), [picture(400, 20)]),
    17: (ask("<image> what ?"), [("jpg", b"not an image")]),
    20: ([{"from": "gpt", "value": "<script>alert(1)</script>"}], []),
}


@pytest.fixture
def command(make_dataset, tokenizer_model, tmp_path):
    """Run `croc data check` on 40 samples with planted oddities."""
    folder = make_dataset(40, records=RECORDS)

    def run(*words: str, out: str = "look", status: int = 0) -> dict:
        given = ["data", "check", folder, "--recipe", "tiny/finetune"]
        given += ["--tokenizer-model", tokenizer_model, "--image-decoder", "pil"]
        assert main([*given, "--out", str(tmp_path / out), *words]) == status
        return json.loads((tmp_path / out / "check.json").read_text()) if not status else {}

    return run


def test_what_is_planted_is_found(command, tmp_path, capsys):
    survey = command()
    printed = capsys.readouterr().out
    assert survey["num_samples"] == survey["num_looked_at"] == 40
    assert survey["images_per_sample"] == {"0": 11, "1": 19, "2": 10}
    assert survey["text_only_share"] == 0.275
    assert survey["bad"] == {"no_label": 1, "image": 1, "roles": 1}
    reasons = {one["kind"]: one["reason"] for one in survey["bad_examples"]}
    assert "answers are cut off" in reasons["no_label"]
    cut = survey["truncation"]
    assert (cut["num_cut"], cut["num_without_answer"]) == (2, 1)
    assert 0 < cut["share_of_labels_lost"] < 1 and cut["proposed_seq_length"] > 512
    assert survey["truncation_by_source"]["set"]["num_cut"] == 2
    assert survey["scripts"] == {"Latin": 39, "Cyrillic": 1}
    assert survey["equal_images"]["num_repeats"] == 1
    assert survey["equal_texts"]["num_repeats"] == 2  # of sample 8, and of sample 16
    pair = ["set/000001-000003", "set/000002-000002"]
    assert survey["equal_images"]["largest"] == [{"count": 2, "samples": pair}]
    assert survey["aspects"][">= 5"] == 1 and survey["image_formats"]["PNG"] == 1
    strange = {one["number"]: "; ".join(one["reasons"]) for one in survey["strangest"]}
    assert strange[16] == "image of 400 x 20 pixels; short side of 20 pixels"
    assert "script Cyrillic" in strange[13] and "tokens (median" in strange[9]
    assert {4, 17, 20} <= set(strange)
    for line in (
        "40 samples: 27.5% text only",
        "warning: 3 of 40 samples are bad (no_label: 1, image: 1, roles: 1); training stops above",
        "warning: 2 samples are longer than seq_length = 512",
    ):
        assert line in printed
    page = (tmp_path / "look" / "check.html").read_text()
    assert page.isascii() and "<script" not in page and "http" not in page
    assert page.count('class="sample"') == len(survey["strangest"]) <= 20
    assert page.count('<span class="label">') > 20
    sides = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    import base64

    first = Image.open(io.BytesIO(base64.b64decode(sides[0])))
    assert first.size == (first.width, first.width)  # padded to the square that the model sees


def test_a_part_of_a_large_folder(command, tmp_path, capsys):
    survey = command("--max-samples", "10", "--strangest", "3")
    assert (survey["num_looked_at"], len(survey["strangest"])) == (10, 3)
    assert "40 samples (10 looked at, evenly spread)" in capsys.readouterr().out
    page = (tmp_path / "look" / "check.html").read_text()
    assert "10 of 40 samples, evenly spread (--max-samples)" in page
    assert choose_samples(10**9, 3) == [0, 500_000_000, 999_999_999]
    assert choose_samples(5, 0) == choose_samples(5, 9) == [0, 1, 2, 3, 4]


def test_changes_are_told(command, make_dataset, tokenizer_model, tmp_path, capsys):
    command(out="before")
    earlier = str(tmp_path / "before" / "check.json")
    capsys.readouterr()
    command("--compare", earlier)
    printed = capsys.readouterr().out
    assert "changed: the samples are the same" in printed and printed.count("changed:") == 1
    command("--compare", earlier, "--seq-length", "4096")
    printed = capsys.readouterr().out
    assert "changed: seq_length: 512 -> 4096" in printed
    assert "bad samples (no_label): 2.5% -> 0.0%" in printed and "labels lost by the cut" in printed
    other = make_dataset(4, name="other")
    words = ["data", "check", other, "--recipe", "tiny/finetune", "--image-decoder", "pil"]
    words += ["--tokenizer-model", tokenizer_model, "--out", str(tmp_path / "o")]
    assert main([*words, "--compare", earlier]) == 0
    printed = capsys.readouterr().out
    assert "changed: num_samples: 40 -> 4" in printed
    assert "samples in script Cyrillic: 2.5% -> 0.0%" in printed
    assert "the samples are the same" not in printed
    assert "samples of text only: 27.5% -> 25.0%" in printed
    assert "Changed since the earlier look" in (tmp_path / "o" / "check.html").read_text()


def test_wrong_words_are_one_line(command, tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    for words, reason in (
        (["--compare", str(tmp_path / "x.json")], "was not written by croc data check"),
        (["--compare", str(tmp_path / "none.json")], "cannot be read"),
        (["--max-samples", "-1"], "must not be negative"),
    ):
        command(*words, status=1)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert main(["data", "check", "--recipe", "tiny/finetune", str(tmp_path)]) == 1
    assert main(["data", "check", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "name the dataset folders first" in lines[0]
    assert "--tokenizer-model is not given" in lines[1]
    with pytest.raises(DataError, match="holds no finished dataset"):
        check.main([str(tmp_path), "--tokenizer-model", "t"])


def test_scripts_of_letters():
    found = [_kind_of(c) for c in "a\u00e9\u4e2d\u3042\u30ab\ud55c\u0639 1\u0301!\U0001f600"]
    assert found == [
        "Latin", "Latin", "Han", "Kana", "Kana", "Hangul", "Arabic", "", "", "", "symbol", "symbol",
    ]  # fmt: skip
