"""Accuracy and chance, counted by hand."""

import json

import pytest

from megatron_croc.evaluation.prompts import Answer
from megatron_croc.evaluation.questions import Question
from megatron_croc.inference.answers import (
    Accuracy,
    accuracy_by_type,
    as_table,
    normalise,
    write_report,
)


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
    assert lines[1].split() == ["colour", "3", "66.7%", "27.2%", "66.7%", "red"]
    assert "in these very questions" in lines[-1]


def counted(num_questions: int, num_right: int, num_by_chance: int) -> Accuracy:
    return Accuracy(
        kind="colour",
        num_questions=num_questions,
        num_right=num_right,
        num_by_chance=num_by_chance,
        most_common="red",
        counted_in="training",
    )


def test_the_standard_error_is_the_binomial_one():
    assert counted(100, 20, 10).standard_error == pytest.approx(0.04)
    assert counted(100, 100, 10).standard_error == 0


@pytest.mark.parametrize(
    ("num_questions", "num_right", "num_by_chance", "is_above"),
    [
        (100, 31, 20, False),  # 0.11 against 2 x 0.0611
        (100, 33, 20, True),  # 0.13 against 2 x 0.0617
        (100, 7, 20, False),  # below chance
        (100, 50, 50, False),
        (9, 9, 0, False),  # too few to show anything
        (10, 10, 0, True),
    ],
)
def test_a_type_is_marked_above_chance_by_two_standard_errors(
    tmp_path, num_questions, num_right, num_by_chance, is_above
):
    row = counted(num_questions, num_right, num_by_chance)
    assert row.is_above_chance is is_above
    assert list(as_table([row]))[1].split().count("*") == is_above
    write_report(tmp_path / "r.json", [row])
    (written,) = json.loads((tmp_path / "r.json").read_text())
    assert written["is_above_chance"] is is_above
    assert written["standard_error"] == row.standard_error


def test_only_small_things_are_overlooked():
    assert normalise(" At  the Left. ") == "at the left"
    assert normalise("3.5") != normalise("35")
