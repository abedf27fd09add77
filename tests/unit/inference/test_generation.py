"""Answers do not depend on batch, cache, layout or where the weights came from."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_croc.data.demo.small import write_demo
from tests.support.distributed import run_distributed
from tests.support.synthetic import tiny_run

NEW_TOKENS = 12


def save_random(demo: Path, save: Path, changes: dict) -> None:
    """A checkpoint of random weights, large enough that every token counts (on each rank)."""
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.build import build_training_state
    from tests.support.checkpoints import save_checkpoint

    settings = dict(vocab_size=512, init_method_std=0.15) | changes
    words = str(demo / "tokenizer.model")
    run = tiny_run("finetune", tokenizer_model=words, save=str(save), **settings)
    pg = start_distributed(run.parallel, seed=1)
    training = build_training_state(run, pg, train_iters=1)
    save_checkpoint(run, training.state, training.chunks, training.optimizer, pg)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo"), ())


@pytest.fixture(scope="module")
def checkpoint(demo: Path, tmp_path_factory) -> Path:
    """Written at tensor parallel 2."""
    save = tmp_path_factory.mktemp("run") / "save"
    run_distributed(save_random, 2, demo, save, dict(tensor_model_parallel_size=2))
    return save


@pytest.fixture(scope="module")
def export(checkpoint: Path, demo: Path, tmp_path_factory) -> Path:
    from megatron_croc.convert.exporting import export_huggingface

    out = tmp_path_factory.mktemp("export") / "hf"
    export_huggingface(checkpoint, out, tokenizer=demo / "tokenizer.model")
    return out


@pytest.fixture(scope="module")
def generator(export: Path):
    from megatron_croc.inference.generation import open_generator

    with open_generator(export) as opened:
        yield opened


@pytest.fixture(scope="module")
def questions(demo: Path) -> list:
    """One image, two images, none, and later rounds; of many lengths."""
    from megatron_croc.evaluation.questions import ask, read_questions

    found = read_questions(demo / "finetune.json", demo / "images")
    one, two = ([q for q in found if len(q.images) == number] for number in (1, 2))
    text_only = [
        ask("Which number follows one?", []),
        ask("Which colour do red and blue make?", []),
    ]
    return [*one[:3], *two[:2], *text_only, one[3]]


def sampling(**changes: object):
    from megatron_croc.inference.generation import Sampling

    return Sampling(**{"max_new_tokens": NEW_TOKENS, **changes})


@pytest.fixture(scope="module")
def greedy(generator, questions) -> list:
    """One at a time, most likely token."""
    return [answer.ids for answer in generator.answer(questions, sampling())]


def ids_of(answers) -> list:
    return [answer.ids for answer in answers]


def test_answers_differ_and_are_words(greedy):
    assert len(set(greedy)) == len(greedy)  # else the comparisons below say little
    assert all(0 <= token < 512 for ids in greedy for token in ids)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_batch_gives_what_single_questions_give(generator, questions, greedy, batch_size):
    """Left padding, several images, and rows without any side by side."""
    assert ids_of(generator.answer(questions, sampling(), batch_size=batch_size)) == greedy


def test_without_cache_the_same(generator, questions, greedy):
    answers = generator.answer(questions, sampling(use_cache=False), batch_size=4)
    assert ids_of(answers) == greedy


def test_images_matter_and_so_does_their_order(generator, questions, greedy):
    question = next(q for q in questions if len(q.images) == 2)
    turned = dataclasses.replace(question, images=question.images[::-1])
    inputs = [generator.inputs([q])["pixel_values"] for q in (question, turned)]
    assert torch.equal(inputs[0], inputs[1].flip(0)) and not torch.equal(*inputs)
    with torch.no_grad():
        one, other = (generator.model(**generator.inputs([q])).logits for q in (question, turned))
    assert (one[0, -1] - other[0, -1]).abs().max() > 1e-3


def test_draws_are_a_function_of_the_seed(generator, questions):
    state = torch.get_rng_state()

    def draw(seed: int, **more: object) -> list:
        chosen = sampling(temperature=1.0, seed=seed, **more)
        return ids_of(generator.answer(questions, chosen, batch_size=4))

    first = draw(1)
    assert draw(1) == first and draw(2) != first
    assert draw(1, top_k=3) != first
    assert torch.equal(torch.get_rng_state(), state)  # a training run goes on undisturbed


def test_narrow_draws_are_the_most_likely_token(generator, questions, greedy):
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)):
        chosen = sampling(**{"temperature": 1.0, **narrow})
        assert ids_of(generator.answer(questions, chosen, batch_size=4)) == greedy, narrow


def test_a_checkpoint_of_tensor_parallel_2_answers_as_its_export(checkpoint, questions, greedy):
    from megatron_croc.inference.generation import open_generator

    iteration = next(checkpoint.glob("iter_*"))
    for folder in (checkpoint, iteration):
        with open_generator(folder) as opened:
            assert ids_of(opened.answer(questions, sampling(), batch_size=8)) == greedy


def test_generation_is_the_models_own_argmax(generator, questions, greedy):
    """Against a loop of our own over whole forward passes: nothing of `generate` is believed."""
    question = questions[0]
    inputs = generator.inputs([question])
    ids, said = inputs["input_ids"], []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = generator.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        token = int(logits[0, -1, :512].argmax())
        said.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token in generator.prompts.stop_ids:
            break
    assert tuple(said) == greedy[0]


@pytest.mark.parametrize("template", ["v1", "plain", "qwen_1_5"])
def test_a_prompt_is_the_beginning_of_the_training_sample(demo, template, tokenizers):
    from megatron_croc.data.sample.tokenization import (
        stop_ids,
        tokenize_conversation,
        tokenize_prompt,
    )
    from megatron_croc.evaluation.questions import read_questions

    tokenizer = tokenizers[template]
    name = "pretrain_mlp" if template == "plain" else "finetune"
    records = json.loads((demo / f"{name}.json").read_text())[:12]
    asked = read_questions(demo / f"{name}.json", demo / "images")
    for record in records:
        images = [record["image"]] if isinstance(record.get("image"), str) else record.get("image")
        whole = tokenize_conversation(
            tokenizer,
            template,
            record["conversations"],
            num_images=len(images or []),
            sample_id="a",
        ).input_ids.tolist()
        rounds = [q for q in asked if str(q.question_id).split("/")[0] == record["id"]]
        assert len(rounds) == len(record["conversations"]) // 2
        for question in rounds:
            prompt = tokenize_prompt(
                tokenizer, template, question.text, history=question.history
            ).tolist()
            assert prompt == whole[: len(prompt)]
            rest = whole[len(prompt) :]
            ends = [place for place, t in enumerate(rest) if t in stop_ids(tokenizer, template)]
            assert tokenizer.decode(rest[: ends[0]]).strip() == question.expected


@pytest.fixture(scope="module")
def tokenizers(demo: Path, tmp_path_factory) -> dict:
    """Of each template."""
    from megatron_croc.data.sample.tokenization import build_tokenizer

    folder = tmp_path_factory.mktemp("chatml")
    write_chatml(folder)
    llama = build_tokenizer("SentencePieceTokenizer", str(demo / "tokenizer.model"))
    chatml = build_tokenizer("HuggingFaceTokenizer", str(folder))
    return {"v1": llama, "plain": llama, "qwen_1_5": chatml}


def write_chatml(folder: Path) -> None:
    """A tokenizer like Qwen's: bytes, and the tokens of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("template", ["v1", "plain", "qwen_1_5"])
def test_answers_are_found_in_packed_rows(demo, template, tokenizers):
    """The finder finds exactly the answers of the record, in every template."""
    import numpy as np

    from megatron_croc.data.sample.answer_spans import AnswerFinder
    from megatron_croc.data.sample.tokenization import tokenize_conversation

    tokenizer = tokenizers[template]
    name = "pretrain_mlp" if template == "plain" else "finetune"
    ids, labels, bounds, expected = [], [], [0], []
    for record in json.loads((demo / f"{name}.json").read_text())[:6]:
        images = record.get("image") or []
        sample = tokenize_conversation(
            tokenizer,
            template,
            record["conversations"],
            num_images=1 if isinstance(images, str) else len(images),
            sample_id="a",
        )
        ids += sample.input_ids.tolist()
        labels += [*sample.labels[1:].tolist(), -100]
        bounds.append(len(ids))
        expected += [m["value"] for m in record["conversations"][1::2]]
    finder = AnswerFinder(tokenizer, template)
    packed = np.array([*ids, 0, 0]), np.array([*labels, -100, -100])
    spans = finder.find(*packed, np.array(bounds))
    said = [tokenizer.decode(labels[begin:end]).strip() for begin, end in spans]
    assert said == expected
    cut = bounds[-1] - (3 if template == "qwen_1_5" else 1)  # the last answer loses its end
    spans = finder.find(packed[0][:cut], packed[1][: cut - 1], np.array([*bounds[:-1], cut - 1]))
    assert len(spans) == len(expected) - 1


def test_plain_stops_at_the_line_end(tokenizers):
    from megatron_croc.data.sample.tokenization import stop_ids

    tokenizer = tokenizers["plain"]
    (line_end,) = tokenizer.encode("\n", follows="text")
    assert line_end in stop_ids(tokenizer, "plain")
    assert line_end not in stop_ids(tokenizer, "v1")


def test_code_beside_the_weights_is_not_run(export, tmp_path):
    from megatron_croc.errors import CheckpointError
    from megatron_croc.inference.generation import open_generator

    trace = tmp_path / "trace"
    bad = Path(shutil.copytree(export, tmp_path / "bad"))
    for name in ("modeling_croc.py", "configuration_croc.py"):
        with (bad / name).open("a") as file:
            file.write(f"open({str(trace)!r}, 'w').close()\n")
    with (
        pytest.raises(CheckpointError, match="--trust-remote-code"),
        open_generator(bad),
    ):
        pass
    assert not trace.exists()
    with open_generator(bad, trust_remote_code=True):
        pass
    assert trace.exists()  # the check above would have seen it run


def test_a_folder_saved_again_by_transformers(export, questions, greedy, tmp_path, capsys):
    from transformers import LlavaProcessor

    from megatron_croc.cli.generate import main
    from megatron_croc.convert.export_loader import load_export
    from megatron_croc.inference.generation import open_generator

    again = tmp_path / "again"
    load_export(export).save_pretrained(again)
    LlavaProcessor.from_pretrained(export).save_pretrained(again)
    assert not (again / "tokenizer.model").exists() and not (again / "modeling_croc.py").exists()
    with open_generator(again) as generator:
        assert ids_of(generator.answer(questions, sampling())) == greedy
    other = json.loads((again / "tokenizer.json").read_text()) | {"normalizer": None}
    (again / "tokenizer.json").write_text(json.dumps(other))  # its ids would be others
    assert main(["--model", str(again), "--prompt", "a"]) == 1
    assert "--tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="llava_llama"), ["is a release", "import it first"]),
        (dict(model_type="opt"), ["model_type 'opt'", "import it first"]),
        (dict(croc_conversation=None), ["has no croc_conversation", "export"]),
    ],
)
def test_other_directories_are_refused_in_one_line(export, tmp_path, capsys, changes, words):
    from megatron_croc.cli.generate import main

    bad = Path(shutil.copytree(export, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | changes))
    assert main(["--model", str(bad), "--prompt", "a"]) == 1
    loading, error = capsys.readouterr().err.splitlines()
    assert loading == f"loading {bad}" and error.startswith("error: ")
    assert all(word in error for word in words), error


def test_damaged_weights_are_one_line(export, tmp_path, capsys):
    from megatron_croc.cli.generate import main

    bad = Path(shutil.copytree(export, tmp_path / "bad"))
    (weights,) = bad.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["--model", str(bad), "--prompt", "a"]) == 1
    _, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {bad}: does not load: ")


def test_a_lost_tokenizer(checkpoint, tmp_path, capsys):
    from megatron_croc.cli.generate import main

    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    run = next(copy.glob("iter_*")) / "run.yaml"
    run.write_text(run.read_text().replace("tokenizer.model", "gone.model"))
    assert main(["--model", str(copy), "--prompt", "a"]) == 1
    assert "--tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_the_exports(export, demo, tmp_path, capsys):
    from megatron_croc.cli.generate import main

    other = tmp_path / "tokenizer.model"
    other.write_bytes((demo / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    words = ["--model", str(export), "--prompt", "a", "--max-new-tokens", "1"]
    assert main([*words, "--tokenizer", str(demo / "tokenizer.model")]) == 0
    assert main([*words, "--tokenizer", str(other)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is not the tokenizer that" in error and "leave --tokenizer out" in error


def test_what_does_not_fit_is_refused_before_anything_is_answered(generator, questions):
    from megatron_croc.errors import DataError

    with pytest.raises(DataError, match="context has 4096"):
        generator.check(questions, sampling(max_new_tokens=4090))


def test_rows_that_are_no_words_are_never_said(demo, tmp_path, questions):
    """A table padded beyond the tokenizer's 512 words, as those of many releases are."""
    from megatron_croc.errors import DataError
    from megatron_croc.inference.generation import open_generator

    changes = dict(vocab_size=576, rope_scaling_type="linear", rope_scaling_factor=2.0)
    run_distributed(save_random, 1, demo, tmp_path / "save", changes)
    with open_generator(tmp_path / "save") as opened:
        assert opened.prompts.tokenizer.size == 512
        rows = opened.model.get_output_embeddings().weight.shape[0]
        assert rows >= 576
        table = opened.model.get_output_embeddings().weight
        with torch.no_grad():
            table[512:576] *= 100.0  # most likely wherever their logit is positive
            said = [opened.model(**opened.inputs([q])).logits[0, -1].argmax() for q in questions]
        assert max(said) >= 512
        ids = ids_of(opened.answer(questions, sampling()))
        assert all(token < 512 for answer in ids for token in answer)
        # The context of a model whose positions are scaled is as much longer.
        opened.check(questions, sampling(max_new_tokens=5000))
        with pytest.raises(DataError, match="context has 8192"):
            opened.check(questions, sampling(max_new_tokens=8190))


def test_the_command_writes_answers_and_a_report(checkpoint, demo, tmp_path, capsys):
    from megatron_croc.cli.generate import main

    lines = [
        {"question_id": 7, "image": "000001.jpg", "text": "Is there a red star?", "answer": "no"},
        {"text": "Which number follows one?", "answer": "two", "type": "number"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, report = tmp_path / "answers.jsonl", tmp_path / "report.json"
    command = ["--model", str(checkpoint), "--input", str(path)]
    command += ["--image-folder", str(demo / "images"), "--max-new-tokens", "4"]
    command += ["--output", str(out), "--report", str(report)]
    assert main([*command, "--baseline", str(demo / "finetune.json")]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["question_id"] for a in answers] == [7, "line 2"]
    assert answers[0]["prompt"] == "<image>\nIs there a red star?"
    assert [row["kind"] for row in json.loads(report.read_text())] == ["number", "untyped", "all"]
    assert "most common answer" in capsys.readouterr().out
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    image = demo / "images" / "000002.jpg"
    one = ["--model", str(checkpoint), "--prompt", "What is it?", "--image", str(image)]
    assert main([*one, "--max-new-tokens", "3", "--no-cache"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
