"""Spans of the answers in a pack: exactly the tokens that generation would have to produce."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from megatron_croc.config.data import TemplateName
from megatron_croc.data.sample.conversation import IM_START
from megatron_croc.data.sample.tokenization import Tokenizer, stop_ids
from megatron_croc.ops.special_ids import IGNORE_INDEX


class AnswerFinder:
    """Finds the answers in packs of one template."""

    def __init__(self, tokenizer: Tokenizer, template: TemplateName) -> None:
        """Set the ids that end a prompt and an answer."""
        self._stops = np.array(stop_ids(tokenizer, template))
        self._marker: np.ndarray | None = None
        if template == "qwen_1_5":  # there the tokens around a turn are supervised too
            role = tokenizer.encode("assistant\n", follows="special")
            self._marker = np.array([tokenizer.special_ids[IM_START], *role])

    def find(
        self, input_ids: np.ndarray, labels: np.ndarray, bounds: np.ndarray
    ) -> list[tuple[int, int]]:
        """Find the positions [begin, end) that predict each answer, including its last token.

        Args:
            input_ids: int64 [T], a pack.
            labels: int64 [T], shifted.
            bounds: segment boundaries; positions after the last one are padding.

        Returns:
            Spans in order, without answers that were cut off before their end.
        """
        spans: list[tuple[int, int]] = []
        for first, last in pairwise(bounds):
            for begin in self._begins(input_ids[first:last], labels[first:last]):
                supervised = labels[first + begin : last]
                ends = np.flatnonzero(np.isin(supervised, self._stops))
                if len(ends) and (supervised[: ends[0]] != IGNORE_INDEX).all():
                    spans.append((int(first + begin), int(first + begin + ends[0] + 1)))
        return spans

    def _begins(self, input_ids: np.ndarray, labels: np.ndarray) -> Iterator[int]:
        """Yield the positions of one sample that predict the first token of an answer."""
        if self._marker is None:
            is_answer = labels != IGNORE_INDEX
            yield from np.flatnonzero(is_answer & ~np.insert(is_answer, 0, False)[:-1]).tolist()
            return
        width = len(self._marker)
        for place in range(len(input_ids) - width + 1):
            if np.array_equal(input_ids[place : place + width], self._marker):
                yield place + width - 1
