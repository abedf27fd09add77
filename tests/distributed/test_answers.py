"""Answers checked in training equal those of the export, at every layout.

A small model learns a few answers by heart and others not. What it then generates in transformers,
token by token, is the truth that one forward pass of the live model must agree with, and that the
live model must generate too.
"""

import json
from pathlib import Path

import pytest

from megatron_croc.data.demo.small import write_demo
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run

NUM_SAMPLES = 16
NEW_TOKENS = 24
STEPS = 80
LAYOUTS = {
    "tp2 sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "pp2 vpp2": (
        2,
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "cp2": (2, dict(context_parallel_size=2)),
    "dp2": (2, {}),
}


def run_of(demo: Path, save: Path, **changes: object):
    return tiny_run(
        "finetune",
        vocab_size=520,  # more than the tokenizer's 512, and no multiple of anything large
        data_path=(str(demo / "finetune"),),
        valid_data_path=(str(demo / "finetune"),),
        tokenizer_model=str(demo / "tokenizer.model"),
        image_decoder="pil",
        num_workers=0,
        seq_length=512,
        train_iters=STEPS,
        global_batch_size=8,
        micro_batch_size=4,
        lr=5e-3,
        projector_lr=5e-3,
        eval_interval=STEPS,
        eval_iters=1,
        eval_answers_iters=NUM_SAMPLES // 8,
        eval_tasks=(str(demo / "task.yaml"),),
        save=str(save),
        save_interval=STEPS,
        log_interval=STEPS,
        **changes,
    )


def train_small(demo: Path, save: Path, changes: dict) -> None:
    from megatron_croc.training.loop import train

    train(run_of(demo, save, **changes))


def asked(demo: Path) -> list:
    """The questions of the first samples."""
    from megatron_croc.evaluation.questions import read_questions

    return read_questions(demo / "first.json", demo / "images")


def answers_of(demo: Path, checkpoint: Path, changes: dict) -> tuple[int, int, list]:
    """(answers, right) as validation counts them, and generated ids, on every rank."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.answers import check_answers
    from megatron_croc.training.build import build_training_state
    from megatron_croc.training.task_answers import generate, open_prompts

    run = run_of(demo, checkpoint, **changes)
    run.checkpoint.save, run.checkpoint.pretrained_checkpoint = None, str(checkpoint)
    pg = start_distributed(run.parallel, seed=1)
    state = build_training_state(run, pg, train_iters=1)
    counts = check_answers(state)
    ids = generate(state, open_prompts(run), asked(demo)[:-1], NEW_TOKENS)  # not a multiple of DP
    return counts.num_answers, counts.num_right, ids


def write_first_task(folder: Path) -> None:
    """Write a task of the first samples, which train_small evaluates."""
    task = dict(task="heart", kind="exact_match", questions="first.json", images="images")
    (folder / "task.yaml").write_text(json.dumps(task | {"max_new_tokens": NEW_TOKENS}))
    records = json.loads((folder / "finetune.json").read_text())[:NUM_SAMPLES]
    (folder / "first.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = write_demo(tmp_path_factory.mktemp("demo"), ("finetune",))
    write_first_task(folder)
    return folder


@pytest.fixture(scope="module")
def trained(demo: Path, tmp_path_factory) -> Path:
    """Train and save with tensor parallel size 2."""
    save = tmp_path_factory.mktemp("run") / "save"
    run_distributed(train_small, 2, demo, save, dict(tensor_model_parallel_size=2))
    return save


@pytest.fixture(scope="module")
def generated(demo: Path, trained: Path) -> list:
    """Answers of transformers to the first samples' questions."""
    from megatron_croc.inference.generation import Sampling, open_generator

    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    with open_generator(trained) as generator:
        return list(generator.answer(asked(demo), sampling, batch_size=8))


def as_trained(demo: Path, answer) -> tuple[int, ...]:
    """Token ids of the true answer in training, including its end."""
    from megatron_croc.data.sample.tokenization import build_tokenizer

    tokenizer = build_tokenizer("SentencePieceTokenizer", str(demo / "tokenizer.model"))
    assert tokenizer.eos_id is not None
    said = tokenizer.encode(" " + answer.question.expected, follows="text")
    return (*said, tokenizer.eos_id)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_agrees_with_generation(layout, demo: Path, trained: Path, generated: list):
    right = sum(answer.ids == as_trained(demo, answer) for answer in generated)
    assert 0 < right < len(generated), "the test says nothing"
    world_size, changes = LAYOUTS[layout]
    seen = run_distributed(answers_of, world_size, demo, trained, changes)
    ids = [list(answer.ids) for answer in generated[:-1]]
    assert seen == [(len(generated), right, ids)] * world_size


@pytest.mark.distributed
def test_training_logs_them(trained: Path, demo: Path, generated: list):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "valid_loss" in row]
    right = sum(answer.ids == as_trained(demo, answer) for answer in generated)
    assert row["valid_num_answers"] == len(generated)
    assert row["valid_answers_right"] == right / len(generated)
    (row,) = [row for row in rows if "eval/heart/accuracy" in row]
    said = [answer.text.lower().rstrip(".") for answer in generated]
    true = [answer.question.expected.lower().rstrip(".") for answer in generated]
    assert row["iteration"] == STEPS and row["eval/heart/num_questions"] == len(generated)
    assert row["eval/heart/accuracy"] == sum(map(str.__eq__, said, true)) / len(generated)
