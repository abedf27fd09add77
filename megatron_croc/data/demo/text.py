"""Texts of the demo data: captions, questions with answers, and text without image.

One function per training stage returns LLaVA's messages. All are pure functions of the scene and
the random generator handed in.
"""

import random
from collections.abc import Sequence

from megatron_croc.data.demo.scenes import COLOURS, SHAPES, Scene, SceneObject
from megatron_croc.data.sample.conversation import IMAGE_MARK

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")

CAPTION_REQUESTS = (
    "Describe the picture in detail.",
    "What does the picture show? Name every object.",
    "Give a full description of the picture.",
)
SHORT_REQUESTS = ("Describe the picture briefly.", "What is in the picture?")

MIXTURES = (
    ("red", "yellow", "orange"),
    ("red", "blue", "purple"),
    ("blue", "yellow", "green"),
)

Messages = list[dict[str, str]]
Round = tuple[str, str, str]
"""Question, answer, type of the question."""


def short_caption(scene: Scene, rng: random.Random) -> Messages:
    """Write a caption for pretrain_mlp: the objects by colour and shape."""
    names = [f"a {item.name}" for item in scene.objects]
    caption = f"{', '.join(names[:-1])} and {names[-1]}"
    return _as_messages([(_with_mark(rng.choice(SHORT_REQUESTS), rng), caption, "caption")])


def detailed_caption(scene: Scene, rng: random.Random) -> Messages:
    """Write a caption for pretrain_croc: every object with size, colour, shape and position."""
    sentences = [f"The picture shows {NUMBERS[len(scene.objects)]} objects."]
    for item in scene.objects:
        sentences.append(f"A {item.size} {item.name} is {_where(item)}.")
    sentences.append(f"The background is {scene.background}.")
    request = _with_mark(rng.choice(CAPTION_REQUESTS), rng)
    return _as_messages([(request, " ".join(sentences), "caption")])


def questions(scene: Scene, rng: random.Random) -> Messages:
    """Write two to four questions about one image, for finetune."""
    kinds = rng.sample((_count_all, _count_shape, _colour, _position, _exists), rng.randint(2, 4))
    rounds = [kind(scene, rng) for kind in kinds]
    rounds[0] = (_with_mark(rounds[0][0], rng), *rounds[0][1:])
    return _as_messages(rounds)


def comparison(first: Scene, second: Scene, rng: random.Random) -> Messages:
    """Write a question about two images and one about one of them, for finetune."""
    marks = f"{IMAGE_MARK}\n{IMAGE_MARK}\n"
    counts = len(first.objects), len(second.objects)
    more = "both the same" if counts[0] == counts[1] else f"the {_which(counts[1] > counts[0])}"
    chosen = rng.randrange(2)
    item = rng.choice((first, second)[chosen].objects)
    return _as_messages(
        [
            (f"{marks}Which picture has more objects?", more, "more of two"),
            (
                f"Where is the {item.name} in the {_which(bool(chosen))} picture?",
                _where(item),
                "position in one of two",
            ),
        ]
    )


def text_only(rng: random.Random) -> Messages:
    """Write questions that need no image, for finetune."""
    rounds = []
    for kind in rng.sample(range(3), 2):
        if kind == 0:
            number = rng.randrange(len(NUMBERS) - 1)
            question = f"Which number follows {NUMBERS[number]}?"
            rounds.append((question, NUMBERS[number + 1], "text: next number"))
        elif kind == 1:
            a, b, mixture = rng.choice(MIXTURES)
            a, b = rng.sample((a, b), 2)
            rounds.append((f"Which colour do {a} and {b} make?", mixture, "text: mixture"))
        else:
            a, b = rng.sample(range(len(NUMBERS)), 2)
            question = f"Which number is larger, {NUMBERS[a]} or {NUMBERS[b]}?"
            rounds.append((question, NUMBERS[max(a, b)], "text: larger number"))
    return _as_messages(rounds)


def _where(item: SceneObject) -> str:
    return f"{'in' if item.position == 'center' else 'at'} the {item.position}"


def _which(is_second: bool) -> str:
    return "second" if is_second else "first"


def _as_messages(rounds: Sequence[Round]) -> Messages:
    """Format rounds as LLaVA's messages; each question also has its type, for reports."""
    return [
        message
        for question, answer, kind in rounds
        for message in (
            {"from": "human", "value": question, "type": kind},
            {"from": "gpt", "value": answer},
        )
    ]


def _with_mark(question: str, rng: random.Random) -> str:
    """Put the image mark before or after the question, as in LLaVA's data."""
    if rng.random() < 0.5:
        return f"{IMAGE_MARK}\n{question}"
    return f"{question}\n{IMAGE_MARK}"


def _count_all(scene: Scene, rng: random.Random) -> Round:
    return "How many objects are there?", NUMBERS[len(scene.objects)], "count"


def _count_shape(scene: Scene, rng: random.Random) -> Round:
    shape = rng.choice(SHAPES)
    count = sum(item.shape == shape for item in scene.objects)
    return (
        f"How many of the objects have the shape of a {shape}?",
        NUMBERS[count],
        "count of a shape",
    )


def _colour(scene: Scene, rng: random.Random) -> Round:
    item = rng.choice(scene.objects)
    return f"What colour is the object {_where(item)}?", item.colour, "colour"


def _position(scene: Scene, rng: random.Random) -> Round:
    item = rng.choice(scene.objects)
    return f"Where is the {item.name}?", _where(item), "position"


def _exists(scene: Scene, rng: random.Random) -> Round:
    names = [item.name for item in scene.objects]
    absent = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in names]
    is_there = rng.random() < 0.5
    name = rng.choice(names if is_there else absent)
    return f"Is there a {name}?", "yes" if is_there else "no", "existence"
