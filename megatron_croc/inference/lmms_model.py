"""A model for lmms-eval that answers with the code of `croc generate`.

    lmms-eval --model croc --model_args pretrained=croc-hf --tasks pope --batch_size 8

Imported by lmms-eval only (lmms_plugin.py).
"""

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import (  # type: ignore[import-not-found]
    GenerationResult,
    Instance,
    TokenCounts,
)
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from tqdm import tqdm

from megatron_croc.errors import ConfigError, DataError
from megatron_croc.evaluation.questions import Question
from megatron_croc.inference.generation import open_generator
from megatron_croc.inference.lmms_messages import question_of, sampling_of


class CrocForLmmsEval(lmms):
    """An export or a checkpoint, in one process."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        tokenizer: str | None = None,
        **others: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: an export or a checkpoint, as `croc generate --model`.
            device: None: the accelerator if there is one, else the CPU.
            dtype: auto (as stored), float32, bfloat16 or float16.
            batch_size: questions at a time.
            tokenizer: for a checkpoint; None: the run's.
            others: refused, except for lmms-eval's own max_batch_size.

        Raises:
            ConfigError: an argument is not known, or lmms-eval runs in several processes.
        """
        super().__init__()
        others.pop("max_batch_size", None)
        if others:
            raise ConfigError(f"--model_args: croc has no argument {', '.join(sorted(others))}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "--model croc runs in one process: start lmms-eval without a launcher"
            )
        self.batch_size_per_gpu = int(batch_size)
        with open_generator(
            Path(pretrained),
            tokenizer=None if tokenizer is None else Path(tokenizer),
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            device=device,
        ) as self.generator:
            pass  # a checkpoint's temporary export is gone; the model is loaded

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests in their order; training's end of an answer ends it, not `until`."""
        results: list[GenerationResult] = []
        progress = tqdm(total=len(requests), desc="croc", unit="question", disable=None)
        for settings, group in groupby(requests, key=lambda request: request.args[2]):
            questions = [self._question(request) for request in group]
            sampling = sampling_of(settings)
            self.generator.check(questions, sampling)
            answers = self.generator.answer(questions, sampling, batch_size=self.batch_size_per_gpu)
            for answer in answers:
                counts = TokenCounts(output_tokens=len(answer.ids))
                results.append(GenerationResult(text=answer.text, token_counts=counts))
                progress.update()
        progress.close()
        return results

    def _question(self, request: Instance) -> Question:
        _, to_messages, _, doc_id, task, split = request.args
        try:
            messages = to_messages(self.task_dict[task][split][doc_id])
            return question_of(messages, question_id=doc_id)
        except DataError as error:
            raise DataError(f"task {task}, {error}") from error

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: tasks of choices by likelihood are not supported."""
        raise NotImplementedError("--model croc generates answers; it gives no likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse: tasks whose next question depends on an answer are not supported."""
        raise NotImplementedError("--model croc answers questions of one round")
