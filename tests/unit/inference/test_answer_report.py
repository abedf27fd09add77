"""Accuracy and chance, counted by hand."""

import json

import pytest

from megatron_croc.inference.answers import accuracy_by_type, as_table, normalise, write_report
from megatron_croc.inference.generation import Answer
from megatron_croc.inference.questions import Question


def said(kind: str | None, expected: str | None, text: str) -> Answer:
    question = Question(question_id=0, text="?", expected=expected, kind=kind)
    return Answer(question=question, text=text, ids=(), is_finished=True)


def learnt(kind: str, *answers: str) -> list[Question]:
    return [Question(question_id=0, text="?", expected=a, kind=kind) for a in answers]


ANSWERS = [
    said("colour", "red", "Red."),
    said("colour", "red", "blue"),
    said("colour", "blue", "blue"),
    said("count", "two", "two "),
    said(None, "yes", "no"),
    said("colour", None, "anything"),
]


def test_chance_is_the_training_datas_most_common_answer(tmp_path):
    rows = accuracy_by_type(ANSWERS, learnt("colour", "blue", "Blue", "red") + learnt("count", "3"))
    colour, count, untyped, total = rows
    assert (colour.num_questions, colour.num_right, colour.num_by_chance) == (3, 2, 1)
    assert (colour.most_common, colour.counted_in) == ("blue", "training")
    assert (count.num_right, count.chance) == (1, 0.0)
    assert (untyped.kind, untyped.counted_in, untyped.chance) == ("untyped", "questions", 1.0)
    assert (total.kind, total.num_questions, total.counted_in) == ("all", 5, "both")
    assert total.accuracy == pytest.approx(3 / 5) and total.chance == pytest.approx(2 / 5)
    write_report(tmp_path / "r.json", rows)
    assert json.loads((tmp_path / "r.json").read_text())[0]["accuracy"] == pytest.approx(2 / 3)


def test_without_training_data_it_is_the_questions_own(tmp_path):
    colour, *_, total = accuracy_by_type(ANSWERS)
    assert (colour.most_common, colour.num_by_chance) == ("red", 2)
    lines = list(as_table([colour, total]))
    assert lines[1].split() == ["colour", "3", "66.7%", "66.7%", "red"]
    assert "in these very questions" in lines[-1]


def test_only_small_things_are_overlooked():
    assert normalise(" At  the Left. ") == "at the left"
    assert normalise("3.5") != normalise("35")
