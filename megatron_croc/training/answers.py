"""Count of the held-out answers that greedy generation would give, from one forward pass.

Greedy generation reproduces an answer exactly when, with the true answer as input, the most likely
token is correct at each of its positions: the first token depends on the prompt alone, the second
on the prompt and a correct first token, and so on. So nothing is generated, and every round of a
conversation is checked at once, at any layout.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.data.loader import build_valid_loader
from megatron_croc.data.sample.answer_spans import AnswerFinder
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.model.interface import ModelOutput
from megatron_croc.parallel.collectives import all_gather, all_reduce
from megatron_croc.parallel.context import gather_sequence
from megatron_croc.parallel.device import current_device
from megatron_croc.training.batch_broadcast import open_batch_broadcast
from megatron_croc.training.build import TrainingState
from megatron_croc.training.schedule import run_schedule
from megatron_croc.training.step import to_model_inputs

Spans = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class AnswerCounts:
    """Counts over all ranks; equal on every rank."""

    num_answers: int
    num_right: int


def check_answers(training: TrainingState) -> AnswerCounts:
    """Check the answers of `eval_answers_iters` global batches, the same ones every time."""
    run, pg = _as_at_inference(training.run), training.pg_collection
    tokenizer = build_tokenizer(run.data.tokenizer_type, run.data.tokenizer_model)
    data_path = run.data.eval_answers_data_path
    finder = AnswerFinder(tokenizer, run.data.conversation_template)
    counts = torch.zeros(2, dtype=torch.float64, device=current_device())
    for chunk in training.chunks:
        chunk.eval()
    with open_batch_broadcast(run, pg, build_valid_loader, data_path=data_path) as broadcaster:
        for _ in range(run.training.eval_answers_iters):
            batches = broadcaster.next_step()
            counts += _count(training, batches, finder, tokenizer.size)
    if pg.tp.rank() or pg.cp.rank():
        counts.zero_()  # all ranks of a replica's last stage have counted the same answers
    all_reduce(counts)
    num_answers, num_right = (int(count) for count in counts.tolist())
    return AnswerCounts(num_answers=num_answers, num_right=num_right)


def _as_at_inference(run: RunConfig) -> RunConfig:
    """Copy of the run with the causal mask, which every export has."""
    run = copy.deepcopy(run)
    run.model.attention_mask_type = "causal"
    return run


@torch.no_grad()
def _count(
    training: TrainingState, batches: list[Batch], finder: AnswerFinder, num_words: int
) -> Tensor:
    """Count answers and correct answers of a global batch.

    Returns:
        float64 [2]; zeros except on the last stage.
    """
    step = partial(_forward_step, finder=finder, num_words=num_words, pg=training.pg_collection)
    counted = run_schedule(
        step,
        batches,
        [len(batch.input_ids) for batch in batches],
        chunks=training.chunks,
        pg_collection=training.pg_collection,
        forward_only=True,
    )
    start = torch.zeros(2, dtype=torch.float64, device=current_device())
    return sum((part["counts"] for part in counted), start=start)


def _forward_step(
    iterator: Iterator[Batch],
    chunk: nn.Module,
    *,
    finder: AnswerFinder,
    num_words: int,
    pg: ProcessGroupCollection,
) -> tuple[Tensor | ModelOutput, partial]:
    """Forward pass called by megatron's schedule; without labels the last stage returns logits."""
    batch = next(iterator)
    inputs = to_model_inputs(batch, pg.cp)
    output = chunk(replace(inputs, labels=None))
    return output, partial(_judge, batch=batch, finder=finder, num_words=num_words, pg=pg)


def _judge(
    output: ModelOutput,
    *,
    batch: Batch,
    finder: AnswerFinder,
    num_words: int,
    pg: ProcessGroupCollection,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Count the answers of one micro-batch; the loss, which the schedule requires, is zero."""
    assert output.logits is not None
    likely = gather_sequence(most_likely(output.logits, num_words, pg.tp), pg.cp)
    is_right = (likely.cpu() == batch.labels).numpy()
    spans = finder.find(
        batch.input_ids.numpy(), batch.labels.numpy(), batch.mixed_mask.cu_seqlens.numpy()
    )
    right = sum(bool(is_right[begin:end].all()) for begin, end in spans)
    counts = torch.tensor([len(spans), right], dtype=torch.float64, device=current_device())
    no_loss = torch.zeros((), device=current_device())
    return no_loss, torch.zeros((), dtype=torch.int), {"counts": counts}


def most_likely(logits: Tensor, num_words: int, tp: dist.ProcessGroup) -> Tensor:
    """Token id with the largest logit; the lowest id of equal ones.

    Args:
        logits: [T, C / TP], this rank's part of the vocabulary.
        num_words: size of the tokenizer; ids from here on are padding and never chosen.
        tp: tensor-parallel group.

    Returns:
        int64 [T], the same on every rank.
    """
    first = tp.rank() * logits.shape[-1]
    logits = logits.float()
    if num_words < first + logits.shape[-1]:
        logits = logits.clone()
        logits[:, max(num_words - first, 0) :] = -torch.inf
    value, index = logits.max(dim=-1)
    values, indices = all_gather(value, tp), all_gather(index + first, tp)
    best, chosen = values[0], indices[0]
    for value, index in zip(values[1:], indices[1:], strict=True):
        chosen = torch.where(value > best, index, chosen)
        best = torch.maximum(value, best)
    return chosen
