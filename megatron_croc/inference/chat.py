"""Conversation with a model: turns, images, and streamed answers.

    text, images -> Conversation.ask -> Question -> generate, in a thread -> ids -> text pieces

The prompt of a turn equals that of `Generator.answer` for the same question and history: its ids
are the first ids of the training sample with the same turns.
"""

import queue
import threading
from collections.abc import Generator as PythonGenerator
from typing import Any

import torch

from megatron_croc.data.sample.conversation import IMAGE_MARK
from megatron_croc.data.sample.image_header import ImageError
from megatron_croc.data.sample.tokenization import Tokenizer
from megatron_croc.errors import DataError
from megatron_croc.evaluation.prompts import Answer
from megatron_croc.evaluation.questions import ImageBytes, Question
from megatron_croc.inference.generation import Generator, Sampling

INCOMPLETE = "\ufffd"
"""Character that tokenizers decode the first bytes of an unfinished character to."""


class TextPieces:
    """Converts ids that arrive one by one to pieces of text; joined, they are the stripped answer.

    White space and an incomplete character at the end are kept until the next id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Args: tokenizer: the model's."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""
        """Text of all pieces so far."""

    def add(self, token: int) -> str:
        """Return the text that this id completes; may be empty."""
        self._ids.append(token)
        return self._grow(self._decode().rstrip(INCOMPLETE).rstrip())

    def end(self) -> str:
        """Return the rest of the answer's text."""
        return self._grow(self._decode().rstrip())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids).lstrip()

    def _grow(self, text: str) -> str:
        if len(text) <= len(self.text):
            return ""
        piece = text[len(self.text) :]
        self.text += piece
        return piece


class Conversation:
    """Turns with one model. One answer at a time; threads must not share it."""

    def __init__(self, generator: Generator, sampling: Sampling) -> None:
        """Args: generator: the model. sampling: used for each answer."""
        self.generator, self.sampling = generator, sampling
        self.reset()

    def reset(self) -> None:
        """Drop all turns and images."""
        self.history: list[tuple[str, str]] = []
        """Finished turns: question with its image marks, answer."""
        self.images: list[ImageBytes] = []
        """Images of the finished turns, in the order of their marks."""
        self.waiting: list[ImageBytes] = []
        """Images of the next question."""
        self.is_finished = True
        """False: the last answer was cut off at max_new_tokens or stopped."""

    def add_image(self, name: str, content: bytes) -> None:
        """Add an image to the next question.

        Args:
            name: for messages.
            content: the encoded image.

        Raises:
            DataError: the image does not decode or is too large.
        """
        try:
            self.generator.prompts.transform.decode_with_pil(content)
        except ImageError as error:
            raise DataError(f"image {name}: {error}") from error
        self.waiting.append(ImageBytes(name=name, content=content))

    def question(self, text: str) -> Question:
        """Build the next question, with its images and all previous turns.

        Raises:
            DataError: the question is empty, too long, or has the wrong number of image marks.
        """
        marks, images = text.count(IMAGE_MARK), len(self.waiting)
        if not text.replace(IMAGE_MARK, "").strip():
            raise DataError("the question is empty: write a text")
        if marks == 0:
            text = f"{IMAGE_MARK}\n" * images + text
        elif marks != images:
            raise DataError(
                f"the question has {marks} {IMAGE_MARK} mark(s), but {images} image(s) wait for "
                f"it: add images first, or leave {IMAGE_MARK} out"
            )
        question = Question(
            question_id=len(self.history) + 1,
            text=text,
            images=(*self.images, *self.waiting),
            history=tuple(self.history),
        )
        if self.generator.prompts.template == "plain" and self.history:
            raise DataError(
                "this model was trained on captions of one round (template plain): reset the "
                "conversation before the next question"
            )
        length = len(self.generator.prompts.ids(question)) + self.sampling.max_new_tokens
        if length > self.generator.prompts.max_length:
            raise DataError(
                f"the conversation and max_new_tokens={self.sampling.max_new_tokens} are {length} "
                f"tokens, the model's context has {self.generator.prompts.max_length}: reset the "
                "conversation, shorten the question or lower --max-new-tokens"
            )
        return question

    def ask(self, text: str) -> PythonGenerator[str, None, None]:
        """Yield the answer to a question in pieces; closing the iterator stops the answer.

        The text so far becomes part of the conversation. A turn without text is dropped, and its
        images belong to the next question.

        Raises:
            DataError: see `question`; before the first piece.
        """
        return self._stream(self.question(text))

    def _stream(self, question: Question) -> PythonGenerator[str, None, None]:
        pieces = TextPieces(self.generator.prompts.tokenizer)
        self.is_finished = False
        ids = stream_ids(self.generator, question, self.sampling)
        try:
            for token in ids:
                if token in self.generator.prompts.stop_ids:
                    self.is_finished = True
                    break
                if piece := pieces.add(token):
                    yield piece
            if piece := pieces.end():
                yield piece
        finally:
            ids.close()
            if pieces.text:
                self.history.append((question.text, pieces.text))
                self.images += self.waiting
                self.waiting = []


def stream_ids(
    generator: Generator, question: Question, sampling: Sampling
) -> PythonGenerator[int, None, None]:
    """Yield the ids of one answer as they are computed.

    They equal the ids of `Generator.answer`, including the last one. The model runs in a thread,
    which ends when the iterator is closed.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    arrived: queue.SimpleQueue[int | Answer | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    class Streamer(BaseStreamer):
        """Passes each new id on; the first call brings the prompt."""

        is_prompt = True

        def put(self, value: Any) -> None:
            if not self.is_prompt:
                arrived.put(int(value.reshape(-1)[0]))
            self.is_prompt = False

        def end(self) -> None: ...

    class Stopped(StoppingCriteria):
        """True for each sequence once the iterator is closed."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.new_full((len(input_ids),), stop.is_set(), dtype=torch.bool)

    def compute() -> None:
        try:
            arrived.put(
                generator.answer_one(
                    question,
                    sampling,
                    streamer=Streamer(),
                    stopping_criteria=StoppingCriteriaList([Stopped()]),
                )
            )
        except BaseException as error:  # raised again by the reader
            arrived.put(error)

    thread = threading.Thread(target=compute, name="croc-chat-compute", daemon=True)
    thread.start()
    try:
        while isinstance(item := arrived.get(), int):
            yield item
        if isinstance(item, BaseException):
            raise item
    finally:
        stop.set()
        thread.join()
