"""Questions as they are read, and one clear line for each that cannot be asked."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_croc.errors import ConfigError, DataError
from megatron_croc.evaluation.questions import ask, read_questions


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_lines(folder):
    path = write(
        folder,
        {"question_id": 3, "image": "a.png", "text": "What?"},
        "",
        {"image": ["a.png", "b.png"], "text": "Is <image> like <image>?", "answer": "yes"},
        {"text": "Why?", "type": "cause"},
    )
    first, second, third = read_questions(path)
    assert (first.question_id, first.text) == (3, "<image>\nWhat?")
    assert second.images == (folder / "a.png", folder / "b.png")
    assert second.text == "Is <image> like <image>?" and second.expected == "yes"
    assert (third.question_id, third.images, third.kind) == ("line 4", (), "cause")


def test_records_of_several_rounds(folder):
    path = folder / "records.json"
    rounds = [("human", "<image>\nOne?"), ("gpt", "1"), ("human", "And <image>?"), ("gpt", "2")]
    messages = [{"from": role, "value": value} for role, value in rounds]
    messages[2]["type"] = "second"
    record = {"id": "x", "image": ["a.png", "b.png"], "conversations": messages, "type": "any"}
    path.write_text(json.dumps([record]))
    first, second = read_questions(path)
    assert (first.question_id, first.expected, first.kind) == ("x/0", "1", "any")
    assert first.images == (folder / "a.png",) and first.history == ()
    assert second.images == (folder / "a.png", folder / "b.png")
    assert second.history == (("<image>\nOne?", "1"),)
    assert (second.text, second.kind) == ("And <image>?", "second")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "not valid JSON"]),
        ("[1]", ["line 2", "must be a JSON object"]),
        ({"image": "a.png"}, ["line 2", 'neither "text" nor "conversations"']),
        ({"text": " "}, ["line 2", 'neither "text"']),
        ({"text": "x", "image": 5}, ["line 2", '"image" must be']),
        ({"question_id": 9, "text": "x", "image": "no.png"}, ["line 2", "question 9", "no.png"]),
        ({"text": "x", "image": "broken.png"}, ["line 2", "broken.png", "not an image"]),
        ({"text": "<image> <image>", "image": "a.png"}, ["line 2", "2 <image> mark(s) for 1"]),
        ({"text": "<image>"}, ["line 2", "1 <image> mark(s) for 0"]),
        ({"conversations": [{"from": "human", "value": "x"}]}, ["line 2", "has no answer"]),
        ({"conversations": 3}, ["line 2", "non-empty list"]),
    ],
)
def test_a_bad_line_is_named(folder, line, words):
    path = write(folder, {"text": "good"}, line)
    with pytest.raises(DataError) as error:
        read_questions(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message


def test_files_that_are_no_questions(folder):
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(folder / "nowhere.json")
    with pytest.raises(DataError, match="has no question"):
        read_questions(write(folder, ""))
    with pytest.raises(DataError, match="not UTF-8"):
        read_questions(folder / "a.png")
    with pytest.raises(DataError, match=r"no\.png"):
        ask("x", [folder / "no.png"])


def test_training_files_are_read_without_their_images(folder):
    path = write(folder, {"text": "x", "image": "gone.png", "answer": "y"})
    assert read_questions(path, opens_images=False)[0].expected == "y"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=1.0, top_p=0.0), "top_p=0"),
        (dict(temperature=1.0, top_k=-1), "top_k=-1"),
        (dict(top_p=0.5), "need a temperature"),
    ],
)
def test_sampling_that_cannot_be_meant(changes, words):
    from megatron_croc.inference.generation import Sampling

    with pytest.raises(ConfigError, match=words):
        Sampling(**changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --prompt or --input"),
        (["--prompt", "a", "--input", "b"], "either --prompt or --input"),
        (["--prompt", "a", "--report", "r"], "go with --input"),
        (["--input", "a", "--image", "b"], "--image goes with --prompt"),
        (["--input", "a", "--batch-size", "0"], "--batch-size 0"),
        (["--input", "a", "--baseline", "b"], "goes with --report"),
        (["--input", "a", "--output", "/nowhere/at/all"], "no folder /nowhere/at"),
        (["--input", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["--prompt", "a", "--temperature", "-2"], "temperature=-2"),
        (["--prompt", "a"], "no checkpoint there"),
    ],
)
def test_the_command_says_it_in_one_line(words, message, tmp_path, capsys):
    from megatron_croc.cli.generate import main

    assert main(["--model", str(tmp_path), *words]) == 1
    error = capsys.readouterr().err.removeprefix(f"loading {tmp_path}\n")
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
