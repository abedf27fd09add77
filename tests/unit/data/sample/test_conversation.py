"""Templates, and the conversations they refuse."""

import pytest

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.sample.conversation import (
    check_conversation,
    parts_as_text,
    render_conversation,
)


def turns(*values, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("messages", "num_images", "kind", "reason"),
    [
        ([], 0, "record", "non-empty list"),
        (None, 0, "record", "non-empty list"),
        (["hello"], 0, "record", '"from" and "value"'),
        ([{"from": "human", "value": 3}], 0, "record", '"from" and "value"'),
        (turns("question"), 0, "no_answer", "last question"),
        (turns("question", " "), 0, "no_answer", "message 1 is empty"),
        (turns("q", "a", roles=("human", "robot")), 0, "roles", "'robot'"),
        (turns("a", "q", roles=("gpt", "human")), 0, "roles", "alternate"),
        (turns("q", "q", roles=("human", "human")), 0, "roles", "alternate"),
        (turns("q", "a"), 1, "image_marks", "0 <image> mark(s) for 1 image(s)"),
        (turns("<image> <image>", "a"), 1, "image_marks", "2 <image> mark(s) for 1 image(s)"),
        (turns("q", "<image>"), 1, "image_marks", "inside an answer"),
    ],
)
def test_refused(messages, num_images, kind, reason):
    with pytest.raises(BadSampleError) as caught:
        check_conversation(messages, num_images=num_images, sample_id="set/7")
    assert caught.value.kind == kind
    assert "set/7" in str(caught.value)
    assert reason in str(caught.value)


def test_plain_takes_one_caption():
    with pytest.raises(BadSampleError, match="one caption"):
        render_conversation(
            "plain", turns("<image>", "a", "b", "c"), num_images=1, sample_id="set/7"
        )


@pytest.mark.parametrize(
    ("question", "num_images", "rendered"),
    [
        ("what is it ?\n<image>", 1, "USER: <image>\nwhat is it ? ASSISTANT: a car</s>"),
        ("<image>", 1, "USER: <image> ASSISTANT: a car</s>"),
        ("is <image> older than <image>?", 2, "USER: is <image> older than <image>? ASSISTANT:"),
        (" no image ", 0, "USER:  no image  ASSISTANT: a car</s>"),
    ],
)
def test_v1_puts_a_single_mark_first(question, num_images, rendered):
    parts = render_conversation(
        "v1", turns(question, "a car"), num_images=num_images, sample_id="s"
    )
    assert rendered in parts_as_text(parts)
