"""Metrics on cases worked out by hand; tests/ecosystem compares them with lmms-eval's own code."""

import pytest

from megatron_croc.evaluation.metrics import Judged, exact_match, pope, vqa
from megatron_croc.evaluation.vqa_answers import normalise_vqa


def judged(*pairs: tuple[str, str]) -> list[Judged]:
    return [Judged(text=said, references=(true,)) for said, true in pairs]


def test_pope():
    pairs = [("Yes", "yes"), ("yes ", "Yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]
    found = pope(judged(*pairs, ("Yes.", "yes")))  # neither yes nor no: wrong, no false negative
    assert found == {
        "accuracy": 3 / 6,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 3 / 6,
        "true_yes_ratio": 4 / 6,
    }
    assert set(pope(judged(("no", "no"))).values()) == {1.0, 0.0}  # no division by zero


@pytest.mark.parametrize(
    ("said", "accuracy"),
    [("red", 1.0), ("The Red.", 1.0), ("blue", (2 * 1 / 3 + 8 * 2 / 3) / 10), ("green", 0.0)],
)
def test_vqa_leaves_each_person_out_in_turn(said, accuracy):
    people = ("red",) * 8 + ("a blue", "blue")
    assert vqa([Judged(text=said, references=people)]) == {"accuracy": pytest.approx(accuracy)}


def test_exact_match_with_any_reference():
    answers = [
        Judged(text=" St. Mary's ", references=("x", "st marys")),
        Judged(text="two", references=("2",)),
    ]
    assert exact_match(answers) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  two dogs!", "2 dogs"),
        ("dont", "don't"),
        ("yall'd've", "y'all'd've"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5 a.m.", "3.5 am"),
        ("red/blue", "red blue"),
        ("red/ blue", "red blue"),
        ("well-lit\n", "well lit"),
        ("1,000 well-lit", "1000 welllit"),
    ],
)
def test_normal_form_of_vqa(answer, normal):
    assert normalise_vqa(answer) == normal
