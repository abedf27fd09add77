"""Prompts of questions, and answers from generated ids: the same for every way to generate.

    Question --Prompts.ids, .pixels--> model --ids--> Prompts.answer --> Answer

Prompts are made by the code of training samples: the ids of a prompt are the first ids of the
training sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_croc.config.data import DataConfig, TemplateName
from megatron_croc.config.model import LanguageModelConfig, VisionTowerConfig
from megatron_croc.data.sample.image_header import ImageError
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.data.sample.tokenization import (
    Tokenizer,
    stop_ids,
    tokenize_conversation,
    tokenize_prompt,
)
from megatron_croc.errors import DataError
from megatron_croc.evaluation.questions import ImageSource, Question
from megatron_croc.ops.special_ids import IMAGE_TOKEN_INDEX


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of the model to one question."""

    question: Question
    text: str
    ids: tuple[int, ...]
    """Generated ids, including the one that ended the answer."""

    is_finished: bool
    """False: the answer was cut off at max_new_tokens."""


class Prompts:
    """Conversion between questions, ids and answers for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: DataConfig,
        *,
        vision: VisionTowerConfig,
        llm: LanguageModelConfig,
    ) -> None:
        """Args: data: template and image handling. vision, llm: sizes of the model."""
        self.tokenizer = tokenizer
        self.template: TemplateName = data.conversation_template
        self.vision = vision
        self.transform = ImageTransform.build(vision, data.image_aspect_ratio)
        self.stop_ids = stop_ids(tokenizer, self.template)
        self.num_words = min(tokenizer.size, llm.vocab_size)
        """Ids from here on have no word, and are never generated."""
        self.max_length = int(llm.max_position_embeddings * llm.rope_scaling_factor)
        """Context of the model, tokens."""

    def ids(self, question: Question) -> np.ndarray:
        """Encode the prompt of a question, int64 [L], IMAGE_TOKEN_INDEX at every visual token.

        Raises:
            DataError: the template has no second round, but the question has a history.
        """
        if self.template == "plain" and question.history:
            raise DataError(
                f"question {question.question_id}: the model was trained with template plain, "
                "which has captions of one round only"
            )
        ids = tokenize_prompt(
            self.tokenizer, self.template, question.text, history=question.history
        )
        return self._expand(ids)

    def expected_ids(self, question: Question) -> list[int]:
        """Encode the true answer as training does, without the id that ends it; [] without one."""
        if not question.expected or not question.expected.strip():
            return []
        rounds = (*question.history, (question.text, question.expected))
        messages = [
            {"from": role, "value": text}
            for turn in rounds
            for role, text in zip(("human", "gpt"), turn, strict=True)
        ]
        sample = tokenize_conversation(
            self.tokenizer,
            self.template,
            messages,
            num_images=len(question.images),
            sample_id=str(question.question_id),
        )
        ids = self._expand(sample.input_ids)[len(self.ids(question)) :].tolist()
        return ids[: _end(ids, self.stop_ids)]

    def _expand(self, ids: np.ndarray) -> np.ndarray:
        return np.repeat(ids, np.where(ids == IMAGE_TOKEN_INDEX, self.vision.num_visual_tokens, 1))

    def pixels(self, question: Question) -> list[Tensor]:
        """Decode the images of a question, uint8 [3, height, width] each.

        Raises:
            DataError: an image does not decode.
        """
        return [self._decode(question, image) for image in question.images]

    def _decode(self, question: Question, image: ImageSource) -> Tensor:
        try:
            return self.transform.decode_with_pil(image.read_bytes())
        except (OSError, ImageError) as error:
            raise DataError(
                f"question {question.question_id}: image {image} does not decode: {error}"
            ) from error

    def check(self, questions: Iterable[Question], max_new_tokens: int) -> None:
        """Check that all questions fit the model's context, before any is answered.

        Raises:
            DataError: a question is too long; names the first one.
        """
        for question in questions:
            length = len(self.ids(question)) + max_new_tokens
            if length > self.max_length:
                raise DataError(
                    f"question {question.question_id}: its prompt and max_new_tokens="
                    f"{max_new_tokens} are {length} tokens, the model's context has "
                    f"{self.max_length}: shorten one of them"
                )

    def answer(self, question: Question, row: Sequence[int]) -> Answer:
        """Build the answer from generated ids, cut after the id that ends it."""
        end = _end(row, self.stop_ids)
        return Answer(
            question=question,
            text=self.tokenizer.decode(row[:end]).strip(),
            ids=tuple(row[: end + 1]),
            is_finished=end < len(row),
        )


def _end(ids: Sequence[int], stops: Sequence[int]) -> int:
    """Place of the first id that ends an answer; the length if there is none."""
    return next((place for place, token in enumerate(ids) if token in stops), len(ids))
