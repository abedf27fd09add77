"""Compare the metrics of local tasks with lmms-eval's own code on random answers.

python judge_at_random.py     # in an environment with lmms-eval and this package
"""

import random
from typing import Any

from lmms_eval.api.metrics import exact_match_hf_evaluate
from lmms_eval.tasks.pope import utils as theirs
from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

from megatron_croc.evaluation.metrics import Judged, exact_match, pope, vqa

ROUNDS = 2000
WORDS = ("a", "The", "two", "none", "dont", "yall'd've", "1,000", "3.5", "red/blue", "it's", "no.")


def phrase(draw: random.Random) -> str:
    return draw.choice((" ", "-", ", ")).join(draw.choices(WORDS, k=draw.randint(1, 3)))


def compare_pope(draw: random.Random) -> None:
    pairs = [
        (draw.choice(("yes", "No", "YES ", "yes.", "")), draw.choice(("yes", "no")))
        for _ in range(draw.randint(1, 9))
    ]
    rows: list[Any] = [
        theirs.pope_process_results({"answer": true, "question_id": 0}, [said.strip()])
        for said, true in pairs
    ]
    ours = pope([Judged(text=said, references=(true,)) for said, true in pairs])
    names = dict(f1="f1_score", true_yes_ratio="yes_ratio")
    for name in ("accuracy", "precision", "recall", "f1", "true_yes_ratio"):
        other = names.get(name, name)
        value = getattr(theirs, f"pope_aggregate_{other}")([row[f"pope_{other}"] for row in rows])
        assert abs(ours[name] - value) < 1e-12, (name, pairs, ours[name], value)


def compare_vqa(draw: random.Random) -> None:
    people = [phrase(draw) for _ in range(2)] * draw.randint(2, 5)
    said = draw.choice(people) if draw.random() < 0.7 else phrase(draw)
    answers = [{"answer_id": number, "answer": text} for number, text in enumerate(people)]
    document = {"answers": answers, "question_id": 0}
    value = vqav2_process_results_val(document, [said.strip()])["exact_match"]
    ours = vqa([Judged(text=said, references=tuple(people))])["accuracy"]
    assert abs(ours - value) < 1e-12, (said, people, ours, value)


def compare_exact_match(draw: random.Random) -> None:
    said, true = phrase(draw), phrase(draw)
    said = draw.choice((said, true, true.upper(), f" {true}!"))
    found = exact_match_hf_evaluate(
        [said.strip()], [true], ignore_case=True, ignore_punctuation=True
    )
    ours = exact_match([Judged(text=said, references=(true,))])["accuracy"]
    assert ours == found["exact_match"], (said, true)


if __name__ == "__main__":
    draw = random.Random(0)
    for _ in range(ROUNDS):
        compare_pope(draw)
        compare_vqa(draw)
        compare_exact_match(draw)
    print(f"{ROUNDS} times the same numbers")
