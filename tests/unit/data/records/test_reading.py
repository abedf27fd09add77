"""Every published form of a record is read; what speaks of an image is read or refused by name."""

import base64

import pytest

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.records.fields import FieldRules
from megatron_croc.data.records.messages import Turns, _as_message, _usual_message
from megatron_croc.data.records.reading import (
    conversation_of,
    read_record,
    texts_of,
)
from megatron_croc.errors import ConfigError
from tests.unit.data.small_samples import jpeg

ASK = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "ho"}]
TALK = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PICTURE = jpeg(1)
TEXT64 = base64.b64encode(PICTURE).decode()
NAN = float("nan")


def part(kind, **content):
    return {"type": kind, **content}


def asked(*parts):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "ho"}]


TEXT_FORMS = {
    # name: record without an image, whose messages are TALK
    "llava": {"conversations": TALK},
    "messages": {"messages": CHAT},
    "roles in conversations": {"conversations": CHAT},
    "from in messages": {"messages": TALK},
    "user, assistant": {
        "conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}]
    },
    "capitals": {
        "conversations": [{"from": "Human", "value": "hi"}, {"from": "GPT", "value": "ho"}]
    },
    "role, value": {
        "messages": [{"role": "user", "value": "hi"}, {"role": "model", "value": "ho"}]
    },
    "role, text": {"turns": [{"role": "user", "text": "hi"}, {"role": "bot", "text": "ho"}]},
    "speaker": {"dialog": [{"speaker": "USER", "text": "hi"}, {"speaker": "AI", "text": "ho"}]},
    "one key each": {"messages": [{"user": "hi"}, {"assistant": "ho"}]},
    "cauldron": {"texts": [{"user": "hi", "assistant": "ho", "source": "aokvqa"}]},
    "pairs": {"conversations": [["hi", "ho"]]},
    "qa_pairs": {"qa_pairs": [{"question": "hi", "answer": "ho"}]},
    "human, gpt": {"conversations": [{"human": "hi", "gpt": "ho"}]},
    "question, answer": {"question": "hi", "answer": "ho"},
    "one of answers": {"question": "hi", "answers": ["ho"]},
    "inputs, targets": {"inputs": "hi", "targets": "ho"},
    "query, response": {"query": "hi", "response": "ho"},
    "instruction, output": {"instruction": "hi", "input": "", "output": "ho"},
    "prompt, completion": {"prompt": "hi", "completion": "ho"},
    "capital names": {"Question": "hi", "Answer": "ho"},
    "JSON in a text": {"conversations": '[{"from": "human", "value": "hi"}, {"gpt": "ho"}]'},
    "struct of lists": {"conversations": {"from": ["human", "gpt"], "value": ["hi", "ho"]}},
    "struct of lists, texts": {"texts": {"user": ["hi"], "assistant": ["ho"], "source": None}},
    "content parts": {"messages": asked(part("text", text="hi"))},
    "content parts of datasets": {"messages": asked({"type": "text", "text": "hi", "index": None})},
    "input_text": {"messages": asked(part("input_text", text="hi"))},
    "plain parts": {"messages": asked("hi")},
    "system": {"conversations": [{"from": "system", "value": "be kind"}, *TALK]},
    "leading answer": {"conversations": [{"from": "gpt", "value": "hello"}, *TALK]},
    "both": {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "assistant", "content": "hello"},
            *CHAT,
        ]
    },
    "empty first": {"conversations": [], "messages": CHAT},
    "null first": {"conversations": None, "messages": CHAT},
    "empty image": {"image": "", "conversations": TALK},
    "NaN image": {"image": NAN, "conversations": TALK},
    "null struct": {"image": {"bytes": None, "path": None}, "conversations": TALK},
    "empty images": {"images": [], "conversations": TALK},
    "list of null": {"images": [None], "conversations": TALK},
    "metadata": {"id": 3, "source": "x", "license": "mit", "score": 0.5, "conversations": TALK},
}

IMAGE_FORMS = {
    # name: (record, images)
    "image": ({"image": "0.png"}, ["0.png"]),
    "images": ({"images": ["0.png"]}, ["0.png"]),
    "img": ({"img": "0.png"}, ["0.png"]),
    "image_path": ({"image_path": "a/0.png"}, ["a/0.png"]),
    "imageFile": ({"imageFile": "0.png"}, ["0.png"]),
    "picture": ({"picture": "0"}, ["0"]),
    "file_name": ({"file_name": "0.png"}, ["0.png"]),
    "path": ({"path": "a/0.JPG"}, ["a/0.JPG"]),
    "jpg": ({"jpg": PICTURE}, [PICTURE]),
    "hub": ({"image": {"bytes": PICTURE, "path": "0.png"}}, [PICTURE]),
    "hub, path alone": ({"image": {"bytes": None, "path": "0.png"}}, ["0.png"]),
    "struct under any name": ({"scan": {"bytes": PICTURE, "path": None}}, [PICTURE]),
    "bytes under any name": ({"data0": PICTURE}, [PICTURE]),
    "base64": ({"image": TEXT64}, [PICTURE]),
    "data URI": ({"image": f"data:image/jpeg;base64,{TEXT64}"}, [PICTURE]),
    "image_base64_str": ({"image_base64_str": [TEXT64]}, [PICTURE]),
    "list in a cell": ({"images": '["0.png", "1.png"]'}, ["0.png", "1.png"]),
    "list in a list": ({"image": [["0.png"]]}, ["0.png"]),
    "same file twice": ({"image": "0.png", "image_path": "/data/0.png"}, ["0.png"]),
    "bytes and their name": ({"image": PICTURE, "file_name": "0.png"}, [PICTURE]),
    "two files": ({"images": ["0.png", "1.png"]}, ["0.png", "1.png"]),
    "numbered": ({"image_2": "b.png", "image_1": "a.png"}, ["a.png", "b.png"]),
    "numbered, null": ({"image_1": "a.png", "image_2": None}, ["a.png"]),
    "file names": (
        {"left_file_name": "b.png", "right_file_name": "a.png"},
        ["b.png", "a.png"],
    ),
    "metadata beside": (
        {"image": "0.png", "image_id": 7, "image_width": 9, "image_url": "http://a/b.jpg"},
        ["0.png"],
    ),
    "url beside bytes": ({"image": PICTURE, "url": "http://a/b.jpg", "id": "b.jpg"}, [PICTURE]),
}

REFUSED = {
    # name: (record, kind, part of the reason)
    "pixel values": ({"pixel_values": [[0.1]], "caption": "x"}, "record", "--ignore pixel_values"),
    "image of numbers": ({"image": 3, "caption": "x"}, "record", "image must hold"),
    "array struct": ({"image": {"array": [1]}, "caption": "x"}, "record", "image must hold"),
    "address alone": ({"image_url": "http://a/b", "caption": "x"}, "missing_image", "not fetched"),
    "url of a jpg": ({"url": "http://a/b.jpg", "caption": "x"}, "missing_image", "url speaks"),
    "id of an image": ({"image_id": 3, "caption": "x"}, "missing_image", "image_id speaks"),
    "id is a file": ({"id": "b.jpg", "caption": "x"}, "missing_image", "id speaks"),
    "address of a caption": ({"url": "http://a/b", "caption": "x"}, "missing_image", "url speaks"),
    "size of a caption": ({"WIDTH": 3, "TEXT": "x"}, "missing_image", "WIDTH speaks"),
    "languages": ({"query": {"de": "x", "en": "y"}, "answer": "z"}, "record", "without a text"),
    "count of images": ({"num_images": 2, "caption": "x"}, "missing_image", "num_images speaks"),
    "size of an image": ({"image_width": 2, "caption": "x"}, "missing_image", "image_width"),
    "nested name": ({"extra": {"a": ["b.png"]}, "caption": "x"}, "missing_image", "extra speaks"),
    "nested field": ({"extra": {"image": 3}, "caption": "x"}, "missing_image", "extra speaks"),
    "another image": (
        {"image": "a.png", "other": "b.png", "conversations": ASK},
        "missing_image",
        "other names an image that is not read",
    ),
    "video": ({"video": "a.mp4", "conversations": TALK}, "record", "--ignore video"),
    "video file": ({"clip": "a.mp4", "conversations": TALK}, "record", "clip is a video"),
    "video beside": ({"image": "a.png", "video": "a", "caption": "x"}, "record", "video"),
    "mark alone": ({"conversations": ASK}, "image_marks", "1 <image> mark"),
    "numbered mark alone": (
        {"query": "<image 1> hi", "response": "ho"},
        "image_marks",
        "<image 1>",
    ),
    "other mark alone": ({"query": "<|image|> hi", "response": "ho"}, "image_marks", "<|image|>"),
    "video mark": ({"query": "<video>\nhi", "response": "ho"}, "record", "video"),
    "data URI in a text": (
        {"query": f"![](data:image/png;base64,{TEXT64}) hi", "response": "ho"},
        "image",
        "data URI",
    ),
    "bad base64": ({"image": "data:image/png;base64,@@", "caption": "x"}, "image", "base64"),
    "hole in a list": ({"image": ["0.png", None], "caption": "x"}, "missing_image", "entry 1 of 2"),
    "several fields": (
        {"image": PICTURE, "mask": {"bytes": jpeg(2), "path": None}, "caption": "x"},
        "image_marks",
        "image, mask",
    ),
    "no mark": ({"image": "0.png", "conversations": TALK}, "image_marks", "write one"),
    "image part without image": ({"messages": asked(part("image"))}, "image_marks", "1 <image>"),
    "audio part": ({"messages": asked(part("audio", audio="a"))}, "record", "type 'audio'"),
    "null content": (
        {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
        "record",
        "message 1: its value is empty",
    ),
    "number": (
        {"conversations": [TALK[0], {"from": "gpt", "value": 5}]},
        "record",
        "in quotes",
    ),
    "tool": (
        {"messages": [*CHAT, {"role": "tool", "content": "x"}]},
        "roles",
        "'tool'; roles are human or user",
    ),
    "no answer": ({"messages": CHAT[:1]}, "no_answer", "remove it"),
    "empty caption": ({"caption": ""}, "no_answer", "caption is empty"),
    "two captions": ({"caption": ["a", "b"]}, "record", "make one record of each"),
    "number as answer": ({"question": "x", "answer": 2}, "record", "write the text itself"),
    "unequal lists": ({"conversations": {"from": ["a"], "value": ["b", "c"]}}, "record", "unequal"),
    "no text": ({"headline": "a"}, "missing_caption", "it has headline: name the field"),
    "not JSON": ({"conversations": "[{'from': 'human'}]"}, "record", "not JSON"),
    "inside and beside": (
        {"images": ["a", "b"], "messages": asked(part("image", image="c"))},
        "image_marks",
        "leave out one",
    ),
    "number of no image": (
        {"images": ["a", "b"], "question": "<image 1> <image 3>", "answer": "x"},
        "image_marks",
        "numbers [1, 3]",
    ),
}


def test_texts_in_every_published_form():
    for name, record in TEXT_FORMS.items():
        reading = read_record(record, name)
        assert reading.messages == TALK, name
        assert reading.images == [], name
        assert conversation_of(record, 0, name) == TALK, name
        assert texts_of(record) == ["hi", "ho"], name


def test_the_short_way_for_usual_messages_is_the_long_one():
    entries = [
        {keys[0]: role, keys[1]: text, **more}
        for keys in (("from", "value"), ("role", "content"), ("role", "value"), ("content", "role"))
        for role in ("human", "User", " gpt", "system", "tool", "", None, 3)
        for text in ("hi", "", " ", None, ["hi"], 3)
        for more in ({}, {"weight": 1}, {"image": "a.jpg"})
    ]
    taken = 0
    for entry in entries:
        turns = Turns(messages=[], fields=[], has_own_marks=True)
        short = _usual_message(entry)
        if short is not None:
            taken += 1
            assert short == _as_message(turns, entry, "message 0"), entry
            assert not turns.images and not turns.notes
    assert taken == 2 * 2 * 3  # two spellings, "human" and "system", every text


def test_images_in_every_published_form():
    for name, (record, images) in IMAGE_FORMS.items():
        marks = "\n".join(["<image>"] * len(images))
        reading = read_record({"caption": " a cat ", **record}, name)
        assert reading.images == images, name
        assert reading.messages == [
            {"from": "human", "value": marks},
            {"from": "gpt", "value": "a cat"},
        ], name
        pair = read_record({"question": "hi", "answer": "ho", **record}, name)
        assert pair.messages[0]["value"] == f"{marks}\nhi", name


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_way_out(name):
    record, kind, reason = REFUSED[name]
    with pytest.raises(BadSampleError) as caught:
        read_record(record, "record 7")
    assert caught.value.kind == kind
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


def test_images_inside_messages():
    inside = {
        "no value": (part("image"), part("text", text="hi")),
        "image": (part("image", image="0.png"), part("text", text="hi")),
        "address": (part("image_url", image_url={"url": "0.png"}), part("text", text="hi")),
        "address as text": (part("image_url", image_url="0.png"), part("text", text="hi")),
        "input_image": (part("input_image", image_url="0.png"), part("input_text", text="hi")),
        "of datasets": (
            {"type": "image", "text": None, "index": 0},
            {"type": "text", "text": "hi", "index": None},
        ),
    }
    for name, parts in inside.items():
        record = {"messages": asked(*parts), "images": ["0.png"]}
        reading = read_record(record, name)
        assert (reading.messages, reading.images) == (ASK, ["0.png"]), name
    decoded = read_record(
        {
            "messages": asked(
                part("image_url", image_url={"url": f"data:image/png;base64,{TEXT64}"})
            )
        },
        "x",
    )
    assert decoded.images == [PICTURE]


def test_images_beside_the_text_of_a_message():
    """They are read; other keys of a message are told."""
    talk = [{**ASK[0], "image": "0.png", "weight": 1}, {**ASK[1], "mood": "glad"}]
    reading = read_record({"conversations": talk}, "x")
    assert (reading.messages, reading.images) == (ASK, ["0.png"])
    assert reading.notes == {"mood of messages is not read": "'glad'"}
    turn = {"user": "<image>\nhi", "assistant": "ho", "frame": "a/0.png"}
    assert read_record({"texts": [turn]}, "x").images == ["a/0.png"]
    for more, kind in (({"image": "0.png"}, "image_marks"), ({"video": "a.mp4"}, "record")):
        with pytest.raises(BadSampleError) as caught:
            read_record({"conversations": [{**TALK[0], **more}, TALK[1]]}, "x")
        assert caught.value.kind == kind


def test_marks_in_every_spelling():
    two = {"images": ["a", "b"], "answer": "x"}
    for question, images, text in (
        ("<image 1> or <image 2>", ["a", "b"], "<image> or <image>"),
        ("<image_2> or <image_1>", ["b", "a"], "<image> or <image>"),
        ("<|image_1|> <|image_2|> <|image_1|>", ["a", "b", "a"], "<image> <image> <image>"),
        ("<image 0> <image 1>", ["a", "b"], "<image> <image>"),
        ("<|image|> or <ImageHere>", ["a", "b"], "<image> or <image>"),
        ("[IMG] or <image_placeholder>", ["a", "b"], "<image> or <image>"),
    ):
        reading = read_record({**two, "question": question}, question)
        assert (reading.messages[0]["value"], reading.images) == (text, images)
    named = read_record({"query": "Picture 1: <img>c.png</img> hi", "response": "x"}, "qwen")
    assert (named.messages[0]["value"], named.images) == ("Picture 1: <image> hi", ["c.png"])
    by_index = {"images": ["a", "b"], "messages": asked({"type": "image", "index": 1}, "or",
                                                        {"type": "image", "index": 0})}  # fmt: skip
    assert read_record(by_index, "index").images == ["b", "a"]


def test_what_is_not_read_is_told():
    record = {"image": "0.png", "id": 1, "hint": "x" * 99, "conversations": ASK, "system": "s"}
    notes = read_record(record, "x").notes
    assert list(notes) == ["field hint is not read", "field system is not read"]
    assert len(notes["field hint is not read"]) < 70
    told = read_record(TEXT_FORMS["both"], "x").notes
    assert list(told.values()) == ["'be kind'", "'hello'"]
    assert "image is empty: a sample of text only" in read_record(TEXT_FORMS["NaN image"], "").notes


def test_rules_are_the_way_out():
    record = {"headline": "a cat", "scan_a": "0", "mask": "m.png"}
    rules = FieldRules.parse(["headline=caption", "scan_a=image"], ["mask"])
    assert read_record(record, "x", rules=rules).images == ["0"]
    with pytest.raises(ConfigError, match="OLD=NEW"):
        FieldRules.parse(["headline"])
