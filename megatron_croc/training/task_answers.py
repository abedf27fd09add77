"""Evaluation of local tasks by generation, on the ranks and in the layout of training.

    questions of a replica --packs--> pipeline --last stage--> most likely ids --> all its ranks
                              ^                                                        |
                              +----------------- next round: one more id --------------+

Prompts, pixels, ends of answers and metrics are those of `croc eval`. There is no cache of keys and
values: each round computes the whole sequences again. The first round has the true answer as a
draft behind the prompt. Ids up to the first one that differs are what the model generates, so a
right answer takes one round.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, Batch
from megatron_croc.data.batch_builder import pack_multiple
from megatron_croc.data.sample.collate import ReadySample, collate, placeholder_sample
from megatron_croc.data.sample.tokenization import (
    TokenizedSample,
    build_tokenizer,
    check_tokenizer,
)
from megatron_croc.evaluation.prompts import Prompts
from megatron_croc.evaluation.questions import Question
from megatron_croc.evaluation.tasks import EvalTask, measure, read_tasks
from megatron_croc.model.interface import ModelOutput
from megatron_croc.parallel.collectives import all_reduce
from megatron_croc.parallel.context import gather_sequence
from megatron_croc.parallel.device import current_device
from megatron_croc.parallel.stopwatch import region
from megatron_croc.training.answers import most_likely
from megatron_croc.training.build import TrainingState
from megatron_croc.training.safety.heartbeat import enter
from megatron_croc.training.schedule import run_schedule
from megatron_croc.training.step import to_model_inputs


def open_prompts(run: RunConfig) -> Prompts:
    """Build the conversion of questions for the model and the tokenizer of a run.

    Raises:
        DataError: the tokenizer is missing or does not fit the model.
    """
    data, model = run.data, run.model
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    check_tokenizer(tokenizer, data.conversation_template, model.language_model.vocab_size)
    return Prompts(tokenizer, data, vision=model.vision_tower, llm=model.language_model)


def open_tasks(run: RunConfig) -> list[EvalTask]:
    """Read the tasks of a run; decode all their images and encode all their questions.

    Raises:
        DataError: a task file, a question or an image is faulty, or a question is too long.
    """
    tasks = read_tasks([Path(path) for path in run.training.eval_tasks])
    prompts = open_prompts(run) if tasks else None
    for task in tasks:
        assert prompts is not None
        prompts.check(task.questions, task.max_new_tokens)
        for question in task.questions:
            prompts.pixels(question)
            prompts.expected_ids(question)
    return tasks


@region("validation", whole=True)
def evaluate_tasks(training: TrainingState, tasks: Sequence[EvalTask]) -> dict[str, float]:
    """Answer the questions of all tasks and compute their metrics.

    Returns:
        `eval/TASK/METRIC` and `eval/TASK/num_questions`, the same on every rank.
    """
    prompts = open_prompts(training.run)
    row: dict[str, float] = {}
    for task in tasks:
        generated = generate(training, prompts, task.questions, task.max_new_tokens)
        texts = [
            prompts.answer(question, ids).text
            for question, ids in zip(task.questions, generated, strict=True)
        ]
        everything = measure(task, texts)[-1]
        row |= {f"eval/{task.name}/{name}": value for name, value in everything.metrics.items()}
        row[f"eval/{task.name}/num_questions"] = everything.num_questions
    return row


@dataclass(kw_only=True)
class _Sequence:
    """One question while it is answered, on each rank of its replica."""

    prompt: np.ndarray
    """int64 [L]."""

    pixels: list[Tensor]
    """On the first stage; else empty."""

    draft: list[int]
    """Guess of the ids that come next."""

    said: list[int] = field(default_factory=list)
    is_over: bool = False

    def sample(self) -> TokenizedSample:
        """Prompt, generated ids and draft, without labels."""
        ids = np.concatenate([self.prompt, np.array([*self.said, *self.draft], dtype=np.int64)])
        return TokenizedSample(
            sample_id="question", input_ids=ids, labels=np.full_like(ids, IGNORE_INDEX)
        )

    def take(self, likely: Sequence[int], stops: Sequence[int], max_new_tokens: int) -> None:
        """Add the ids that are sure: those of the draft that are likely, and one more."""
        for token, guess in zip(likely, [*self.draft, None], strict=True):
            self.said.append(token)
            self.is_over = token in stops or len(self.said) == max_new_tokens
            if self.is_over or token != guess:
                break
        self.draft = []


@torch.no_grad()
def generate(
    training: TrainingState, prompts: Prompts, questions: Sequence[Question], max_new_tokens: int
) -> list[list[int]]:
    """Generate the most likely ids after each question's prompt.

    Args:
        training: the model; each replica answers its share of the questions.
        prompts: conversion of the questions.
        questions: with images that decode (`open_tasks` has seen to it).
        max_new_tokens: most ids of one answer.

    Returns:
        ids of each answer with the one that ended it, the same on every rank.
    """
    run, pg = training.run, training.pg_collection
    for chunk in training.chunks:
        chunk.eval()
    num_packs = pg.pp.size()  # as many as the pipeline has stages, also when it is interleaved
    num_at_once = num_packs * run.training.micro_batch_size
    table = torch.zeros(len(questions), max_new_tokens, dtype=torch.int64, device=current_device())
    mine = range(pg.dp.rank(), len(questions), pg.dp.size())
    for first in range(0, len(mine), num_at_once):
        numbers = mine[first : first + num_at_once]
        sequences = [
            _Sequence(
                prompt=prompts.ids(questions[number]),
                pixels=prompts.pixels(questions[number]) if pg.pp.rank() == 0 else [],
                draft=prompts.expected_ids(questions[number])[: max_new_tokens - 1],
            )
            for number in numbers
        ]
        while open_ones := [sequence for sequence in sequences if not sequence.is_over]:
            enter("generating answers", collective="all-reduce")
            _one_round(training, prompts, open_ones, num_packs, max_new_tokens)
        if pg.tp.rank() == pg.cp.rank() == pg.pp.rank() == 0:
            for number, sequence in zip(numbers, sequences, strict=True):
                ids = torch.tensor(sequence.said, dtype=torch.int64) + 1  # 0 is an empty place
                table[number, : len(ids)] = ids.to(table.device)
    enter("sharing answers", collective="all-reduce")
    all_reduce(table)
    return [[token - 1 for token in row if token] for row in table.tolist()]


def _one_round(
    training: TrainingState,
    prompts: Prompts,
    sequences: list[_Sequence],
    num_packs: int,
    max_new_tokens: int,
) -> None:
    """Run all sequences through the pipeline once, and add what is sure to each."""
    packs = [sequences[number::num_packs] for number in range(num_packs)]
    batches = [_batch(training, prompts, pack) for pack in packs]
    chosen: list[list[int]] = []  # positions of each pack whose next id is asked for
    for pack in packs:
        positions: list[int] = []
        end = 0
        for sequence in pack:
            end += len(sequence.prompt) + len(sequence.said) + len(sequence.draft)
            positions += range(end - len(sequence.draft) - 1, end)
        chosen.append(positions)
    ids = _run(training, batches, chosen, num_words=prompts.num_words)
    for pack, likely in zip(packs, ids, strict=True):
        for sequence in pack:
            size = len(sequence.draft) + 1
            sequence.take(likely[:size], prompts.stop_ids, max_new_tokens)
            del likely[:size]


def _batch(training: TrainingState, prompts: Prompts, pack: list[_Sequence]) -> Batch:
    run, size = training.run, prompts.vision.img_size
    has_pixels = training.pg_collection.pp.rank() == 0
    samples = [ReadySample(tokens=s.sample(), epoch=0, pixel_values=s.pixels) for s in pack]
    samples = samples or [ReadySample(tokens=placeholder_sample("empty"), epoch=0)]
    return collate(
        samples,
        num_visual_tokens=prompts.vision.num_visual_tokens,
        mask_type="causal",  # which every export has
        pad_to_multiple_of=pack_multiple(run.parallel, run.training),
        seed=run.training.seed,
        replace_ratio=None,
        image_shape=(3, size, size) if has_pixels else None,
    )


def _run(
    training: TrainingState, batches: list[Batch], chosen: list[list[int]], *, num_words: int
) -> list[list[int]]:
    """Compute the most likely next id at the chosen positions of each pack, on every rank."""
    pg = training.pg_collection
    items = list(zip(batches, chosen, strict=True))
    found = run_schedule(
        partial(_forward_step, num_words=num_words, pg=pg),
        items,
        [len(batch.input_ids) for batch in batches],
        chunks=training.chunks,
        pg_collection=pg,
        forward_only=True,
    )
    ids = torch.zeros(sum(map(len, chosen)), dtype=torch.int64, device=current_device())
    if found:  # on the last stage
        ids += torch.cat([part["ids"] for part in found])
    all_reduce(ids, group=pg.pp)
    return [part.tolist() for part in ids.cpu().split([len(positions) for positions in chosen])]


def _forward_step(
    iterator: Iterator[tuple[Batch, list[int]]],
    chunk: nn.Module,
    *,
    num_words: int,
    pg: ProcessGroupCollection,
) -> tuple[Tensor | ModelOutput, Callable[[ModelOutput], object]]:
    """Forward pass called by megatron's schedule; without labels the last stage returns logits."""
    batch, positions = next(iterator)
    output = chunk(replace(to_model_inputs(batch, pg.cp), labels=None))
    return output, partial(_choose, positions=positions, num_words=num_words, pg=pg)


def _choose(
    output: ModelOutput, *, positions: list[int], num_words: int, pg: ProcessGroupCollection
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Take the most likely ids of one pack; the loss, which the schedule requires, is zero."""
    assert output.logits is not None
    likely = gather_sequence(most_likely(output.logits, num_words, pg.tp), pg.cp)
    ids = likely[torch.tensor(positions, dtype=torch.int64, device=likely.device)]
    return torch.zeros((), device=likely.device), torch.zeros((), dtype=torch.int), {"ids": ids}
