"""A conversation has training's ids, and its pieces are the answer of `croc generate`."""

import dataclasses
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.conversation import IMAGE_MARK
from megatron_croc.data.sample.tokenization import tokenize_conversation
from megatron_croc.errors import DataError

NEW_TOKENS = 12


def start(generator, **changes: object):
    from megatron_croc.inference.chat import Conversation
    from megatron_croc.inference.generation import Sampling

    return Conversation(generator, Sampling(**{"max_new_tokens": NEW_TOKENS, **changes}))


@pytest.mark.parametrize("image_turn", [None, 0, 1])
def test_ids_are_those_of_the_training_sample(chat_generator, chat_image, image_turn):
    chat = start(chat_generator)
    messages, prompts = [], []
    for turn, text in enumerate(["What is it?", "Which colour?", "How many are there?"]):
        if turn == image_turn:
            chat.add_image("a.jpg", chat_image.read_bytes())
            text_in_training = f"{IMAGE_MARK}\n{text}"
        else:
            text_in_training = text
        prompts.append(chat_generator.prompts.ids(chat.question(text)))
        answer = "".join(chat.ask(text))
        messages += [
            {"from": "human", "value": text_in_training},
            {"from": "gpt", "value": answer},
        ]
    sample = tokenize_conversation(
        chat_generator.prompts.tokenizer,
        chat_generator.prompts.template,
        messages,
        num_images=0 if image_turn is None else 1,
        sample_id="a",
    ).input_ids
    num = chat_generator.prompts.vision.num_visual_tokens
    whole = np.repeat(sample, np.where(sample == IMAGE_TOKEN_INDEX, num, 1)).tolist()
    for prompt in prompts:
        assert prompt.tolist() == whole[: len(prompt)]
    assert len({len(prompt) for prompt in prompts}) == 3
    assert sum(token == IMAGE_TOKEN_INDEX for token in whole) == (0 if image_turn is None else num)


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "seed": 3}])
def test_joined_pieces_are_the_answer(chat_generator, chat_image, changes):
    from megatron_croc.evaluation.questions import ask

    chat = start(chat_generator, **changes)
    chat.add_image("a.jpg", chat_image.read_bytes())
    pieces = list(chat.ask("What is it?"))
    question = ask("What is it?", [chat_image])
    (answer,) = chat_generator.answer([question], chat.sampling)
    assert "".join(pieces) == answer.text and len(pieces) > 2
    assert chat.is_finished == answer.is_finished
    followed = dataclasses.replace(
        ask("Which colour?", []), images=(chat_image,), history=((question.text, answer.text),)
    )
    (second,) = chat_generator.answer([followed], chat.sampling)
    assert "".join(chat.ask("Which colour?")) == second.text


class ByteTokenizer:
    """Ids are UTF-8 bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_no_half_character_is_printed():
    from megatron_croc.inference.chat import TextPieces

    text = "  caf\u00e9 \u732b \U0001f40a  end \n"
    pieces = TextPieces(ByteTokenizer())
    shown = [pieces.add(byte) for byte in text.encode()]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) + pieces.end() == text.strip()
    assert " \u732b" in shown and " \U0001f40a" in shown


def test_a_true_replacement_character_and_an_unfinished_end():
    from megatron_croc.inference.chat import TextPieces

    pieces = TextPieces(ByteTokenizer())
    shown = "".join(pieces.add(byte) for byte in "a\ufffdb\u00e9".encode()[:-1])
    assert shown == "a\ufffdb" and pieces.end() == "\ufffd"  # as `Answer.text` has it


def test_closing_stops_the_model_and_keeps_what_was_said(chat_generator, monkeypatch):
    chat = start(chat_generator, max_new_tokens=100)
    (whole,) = chat_generator.answer([chat.question("What is it?")], chat.sampling)
    computed = []

    def answer_one(*arguments: object, **options: object):
        computed.append(type(chat_generator).answer_one(chat_generator, *arguments, **options))
        return computed[0]

    monkeypatch.setattr(chat_generator, "answer_one", answer_one)
    with closing(chat.ask("What is it?")) as pieces:
        first = next(pieces)
    assert len(computed[0].ids) < len(whole.ids)
    assert chat.history == [("What is it?", first)] and not chat.is_finished
    assert "croc-chat-compute" not in [thread.name for thread in threading.enumerate()]


def test_faults_have_one_line_and_change_nothing(chat_generator, chat_image):
    chat = start(chat_generator)
    with pytest.raises(DataError, match="image a: not an image"):
        chat.add_image("a", b"GIF?")
    with pytest.raises(DataError, match="image a: image does not decode"):
        chat.add_image("a", chat_image.read_bytes()[:2000])
    with pytest.raises(DataError, match="empty"):
        chat.ask(" ")
    with pytest.raises(DataError, match="1 <image> mark"):
        chat.ask("<image> and?")
    with pytest.raises(DataError, match="reset the conversation, shorten"):
        chat.ask("word " * chat_generator.prompts.max_length)
    assert chat.history == [] and chat.waiting == []
    list(chat.ask("What is it?"))
    chat.reset()
    assert chat.history == []


def test_an_error_of_the_model_reaches_the_reader(chat_generator, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    chat = start(chat_generator)
    monkeypatch.setattr(chat_generator, "answer_one", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.ask("What is it?"))
    assert chat.history == []


def run(*words: object, lines: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megatron_croc", "chat", *map(str, words)],
        input=lines,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_terminal_answers_a_line_each(chat_export, chat_demo, chat_generator, chat_image):
    words = "--model", chat_export, "--tokenizer", chat_demo / "tokenizer.model"
    lines = (
        f"What is it?\nWhich colour?\n/reset\n/image none.jpg\n/image {chat_image}\n"
        "What is it?\n/what\n\n/quit\nWhich colour?\n"
    )
    done = run(*words, "--image", chat_image, "--max-new-tokens", NEW_TOKENS, lines=lines)
    chat = start(chat_generator)
    chat.add_image("a", chat_image.read_bytes())
    first, second = "".join(chat.ask("What is it?")), "".join(chat.ask("Which colour?"))
    assert done.stdout == f"{first}\n{second}\n{first}\n"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == [
        "error: image none.jpg: No such file or directory: give the path of an image",
        "error: /what: the commands are /image PATH, /reset and /quit",
    ]
    assert "Traceback" not in done.stderr and done.returncode == 1


def test_faults_before_the_model_is_loaded(tmp_path, capsys):
    from megatron_croc.cli.main import main

    for words, message in (
        (["--image", "none.jpg"], "image none.jpg: No such file"),
        (["--image", "a.jpg", "--web"], "--image is for the terminal"),
        (["--port", "70000"], "must be from 0 to 65535"),
        (["--top-k", "3"], "need a temperature above 0"),
    ):
        assert main(["chat", "--model", str(tmp_path), *words]) == 1
        captured = capsys.readouterr().err
        assert captured.startswith("error: ") and message in captured and captured.count("\n") == 1
