"""Messages of lmms-eval become the text that the export's chat template writes."""

import io
import random

import pytest
from PIL import Image

from megatron_croc.convert.chat_templates import Words, chat_template
from megatron_croc.errors import ConfigError, DataError
from megatron_croc.inference.lmms_messages import question_of, sampling_of

WORDS = ("", "What ", " is it?", "one\n", "  two")


def as_template_writes(messages: list[dict]) -> str:
    """Text of the question that the template `v1` writes."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(chat_template("v1", Words()))
    text = compiled.render(messages=messages, add_generation_prompt=True)
    return text.rpartition("USER: ")[2].removesuffix(" ASSISTANT:")


def test_parts_in_every_order():
    draw = random.Random(0)
    for _ in range(400):
        kinds = draw.choices(("text", "image"), k=draw.randint(1, 5))
        content = [
            {"type": "text", "text": draw.choice(WORDS)} if kind == "text" else {"type": "image"}
            for kind in kinds
        ]
        parts = [part | ({"url": "a.png"} if part["type"] == "image" else {}) for part in content]
        question = question_of([{"role": "user", "content": parts}], question_id=0)
        written = as_template_writes([{"role": "user", "content": content}])
        text = question.text
        if text.count("<image>") == 1:  # training puts a single image first
            text = f"<image>\n{text.replace('<image>', '').strip()}".strip()
        assert text == written, content
        assert len(question.images) == kinds.count("image")


def test_history_and_pixels():
    picture = Image.new("CMYK", (3, 2), (9, 90, 200, 0))
    asked = {"role": "user", "content": [{"type": "image", "url": picture}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    question = question_of(
        [asked, said, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
        question_id=4,
    )
    assert question.text == "Why?" and question.history == (("<image>", "red"),)
    opened = Image.open(io.BytesIO(question.images[0].read_bytes()))
    assert opened.tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("system", "Be short."), ("user", "a")], "message 0 is from system"),
        ([("user", "a"), ("assistant", "b")], "not from the user"),
        ([("user", "an <image>")], "1 <image> mark"),
    ],
)
def test_what_cannot_be_asked(messages, words):
    made = [{"role": role, "content": [{"type": "text", "text": t}]} for role, t in messages]
    with pytest.raises(DataError, match=f"question 7: .*{words}"):
        question_of(made, question_id=7)


def test_settings():
    greedy = sampling_of({"max_new_tokens": 16, "temperature": 0, "top_p": 0, "num_beams": 1})
    assert (greedy.max_new_tokens, greedy.temperature, greedy.top_p) == (16, 0.0, 1.0)
    drawn = sampling_of({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "until": ["\n"]})
    assert (drawn.temperature, drawn.top_p) == (0.7, 0.9)
    with pytest.raises(ConfigError, match="num_beams must be 1"):
        sampling_of({"num_beams": 3})
