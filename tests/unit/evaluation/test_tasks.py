"""Task files as they are read, judged by type, and one clear line for each that is faulty."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_croc.errors import DataError
from megatron_croc.evaluation.tasks import as_table, measure, read_task, read_tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    return tmp_path


def write(folder: Path, records: list, *, name: str = "t.yaml", **settings: object) -> Path:
    (folder / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = dict(task="t", kind="exact_match", questions="q.jsonl") | settings
    (folder / name).write_text(json.dumps({k: v for k, v in task.items() if v is not None}))
    return folder / name


def test_a_task_and_its_results(folder):
    records = [
        {"image": "a.png", "text": "Is it red?", "answer": "yes", "type": "colour"},
        {"image": "a.png", "text": "Is it wide?", "answer": "no"},
        {"image": "a.png", "text": "Is it blue?", "answer": "no", "type": "colour"},
    ]
    task = read_task(write(folder, records, kind="pope", post_prompt="\nOne word."))
    assert task.questions[0].text == "<image>\nIs it red?\nOne word." and task.max_new_tokens == 32
    rows = measure(task, ["yes", "no", "yes"])
    assert [(row.category, row.num_questions) for row in rows] == [
        ("colour", 2),
        ("untyped", 1),
        ("all", 3),
    ]
    assert [row.metrics["accuracy"] for row in rows] == [0.5, 1.0, 2 / 3]
    head, *_, last = as_table(task, rows)
    assert head.split()[:3] == ["t", "questions", "accuracy"] and "66.7%" in last


def test_several_answers_of_records_and_lines(folder):
    people = [{"answer": "red", "answer_id": 1}] * 3 + [{"answer": "blue"}]
    rounds = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    records = [{"text": "What?", "answers": people}, {"conversations": rounds, "answers": people}]
    task = read_task(write(folder, records, kind="vqa"))
    for question in task.questions:
        assert question.references == ("red", "red", "red", "blue")
        assert question.expected == "red"


YES = {"text": "Is it?", "answer": "yes"}


@pytest.mark.parametrize(
    ("records", "settings", "words"),
    [
        ([YES], dict(kind="bleu"), ["t.yaml", "kind must be", "exact_match"]),
        ([YES], dict(kind=None), ["t.yaml", "a key is missing", "kind", "questions"]),
        ([YES], dict(answers="a"), ["t.yaml", "unknown key 'answers'"]),
        ([YES], dict(task="a/b"), ["t.yaml", "task='a/b'", "letters"]),
        ([YES], dict(max_new_tokens=0), ["t.yaml", "max_new_tokens=0", "positive"]),
        ([YES], dict(questions="none.jsonl"), ["t.yaml", "none.jsonl", "cannot be read"]),
        ([YES, {"text": "What?"}], {}, ["question line 2", "no true answer", '"answers"']),
        ([{"text": "What?", "answer": " "}], {}, ["question line 1", "no true answer"]),
        ([{"text": "What?", "answer": 3}], {}, ["line 1", '"answer" must be a text, got 3']),
        ([YES | {"type": 3}], {}, ["line 1", '"type" must be a text, got 3']),
        ([{"text": "What?", "answers": "red"}], {}, ["line 1", '"answers" must be a list']),
        ([{"text": "What?", "answers": [3]}], {}, ["line 1", '"answers" must be a list']),
        ([YES | {"answer": "red"}], dict(kind="pope"), ["yes or no", "'red'", "exact_match"]),
        ([YES], dict(kind="vqa"), ["at least 4", "got 1", "exact_match"]),
        ([YES | {"image": "b.png"}], {}, ["line 1", "b.png"]),
    ],
)
def test_faults_in_one_line(folder, records, settings, words):
    with pytest.raises(DataError) as caught:
        read_task(write(folder, records, **settings))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_files_that_are_no_tasks(folder):
    with pytest.raises(DataError, match=r"gone\.yaml: cannot be read"):
        read_task(folder / "gone.yaml")
    (folder / "list.yaml").write_text("[1]")
    with pytest.raises(DataError, match=r"list\.yaml: an object is needed"):
        read_task(folder / "list.yaml")
    one, two = (write(folder, [YES], name=name) for name in ("one.yaml", "two.yaml"))
    with pytest.raises(DataError, match=r"two\.yaml: another task is named t too"):
        read_tasks([one, two])
