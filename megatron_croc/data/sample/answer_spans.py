"""Where the answers of a packed row stand: what generation would have to say, and nothing else."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from megatron_croc.config.data import TemplateName
from megatron_croc.data.batch import IGNORE_INDEX
from megatron_croc.data.sample.conversation import IM_START
from megatron_croc.data.sample.tokenization import Tokenizer, stop_ids


class AnswerFinder:
    """Finds answers in rows of one template."""

    def __init__(self, tokenizer: Tokenizer, template: TemplateName) -> None:
        """Learn how a prompt ends and an answer stops."""
        self._stops = np.array(stop_ids(tokenizer, template))
        self._marker: np.ndarray | None = None
        if template == "qwen_1_5":  # the words that frame a turn are supervised there too
            role = tokenizer.encode("assistant\n", follows="special")
            self._marker = np.array([tokenizer.special_ids[IM_START], *role])

    def find(
        self, input_ids: np.ndarray, labels: np.ndarray, bounds: np.ndarray
    ) -> list[tuple[int, int]]:
        """[begin, end) of the positions that predict each answer, the token that ends it included.

        Args:
            input_ids: int64 [T], a packed row.
            labels: int64 [T], shifted.
            bounds: sample boundaries; what is behind the last one is padding.

        Returns:
            Answers in order; one that was cut off before its end is left out.
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
        """Positions in one sample that predict the first token of an answer."""
        if self._marker is None:
            is_answer = labels != IGNORE_INDEX
            yield from np.flatnonzero(is_answer & ~np.insert(is_answer, 0, False)[:-1]).tolist()
            return
        width = len(self._marker)
        for place in range(len(input_ids) - width + 1):
            if np.array_equal(input_ids[place : place + width], self._marker):
                yield place + width - 1
