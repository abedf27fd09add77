"""Exports in other programs: transformers 4.57 and 5 with peft, vLLM's server, lmms-eval.

`make ecosystem` makes the environments in build/ecosystem; CROC_ECOSYSTEM names another folder.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from megatron_croc.data.demo.small import write_demo

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("CROC_ECOSYSTEM", ROOT / "build" / "ecosystem"))
VERSIONS = ("transformers-4", "transformers-5")
NEW_TOKENS = 16

pytestmark = pytest.mark.ecosystem


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo"), ("finetune",))


@pytest.fixture(scope="module")
def export(demo: Path, tmp_path_factory) -> Path:
    from megatron_croc.convert.exporting import export_huggingface
    from tests.unit.inference.test_generation import save_random

    folder = tmp_path_factory.mktemp("run")
    heads = dict(num_attention_heads=2, num_query_groups=2)  # of 32: vLLM's smallest on a CPU
    save_random(demo, folder / "save", heads)
    export_huggingface(folder / "save", folder / "hf", tokenizer=demo / "tokenizer.model")
    return folder / "hf"


def run(*command: object, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    words = [str(word) for word in command]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=450, check=False, env=environment
    )


def croc(*words: object) -> str:
    """Output of a command of this package, which must succeed."""
    done = run(sys.executable, "-m", "megatron_croc", *words, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_prompts_logits_and_answers(version: str, export: Path):
    python = FOLDER / version / "bin" / "python"
    command = [sys.executable, "-m", "megatron_croc", "parity", "transformers", export]
    done = run(*command, "--python", python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("6 of 6 prompts as in training") == 4  # loaded, and saved again


@pytest.mark.parametrize("version", VERSIONS)
def test_fine_tuning(version: str, export: Path):
    script = Path(__file__).with_name("fine_tune.py")
    done = run(FOLDER / version / "bin" / "python", "-W", "ignore", script, export)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bfloat16" in done.stdout  # the last check


def test_vllm_answers_as_generate(export: Path, demo: Path):
    from megatron_croc.evaluation.questions import read_questions
    from megatron_croc.inference.generation import Sampling, open_generator

    questions = read_questions(demo / "finetune.json", demo / "images")[:40]
    with open_generator(export, dtype=torch.float32, device="cpu") as generator:
        mark = generator.model.config.image_token_id
        prompts = [generator.prompts.ids(q).tolist() for q in questions]
        ours = list(generator.answer(questions, Sampling(max_new_tokens=NEW_TOKENS), batch_size=8))
    with serve(export) as url:
        for question, prompt, answer in zip(questions, prompts, ours, strict=True):
            body = dict(messages=as_messages(question), max_tokens=NEW_TOKENS)
            theirs = post(f"{url}/v1/chat/completions", body | {"return_token_ids": True})
            assert theirs["prompt_token_ids"] == [mark if i < 0 else i for i in prompt]
            assert theirs["choices"][0]["token_ids"] == list(answer.ids), question
        refused = dict(messages=[{"role": "user", "content": "what is <image>?"}])
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(f"{url}/v1/chat/completions", refused)


class serve:
    """`croc serve` on a free port, for a while; its vLLM computes in float32."""

    def __init__(self, export: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        own = ["--vllm", FOLDER / "vllm" / "bin" / "vllm", "--port", self.port, "--max-images", 2]
        more = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", 4]
        command = [sys.executable, "-m", "megatron_croc", "serve", export, *own, "--", *more]
        cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | cpu
        self.server = subprocess.Popen([str(word) for word in command], env=environment, cwd=ROOT)

    def __enter__(self) -> str:
        url = f"http://127.0.0.1:{self.port}"
        for _ in range(400):
            assert self.server.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return url
            except OSError:
                time.sleep(1)
        raise AssertionError("the server did not start")

    def __exit__(self, *error: object) -> None:
        self.server.send_signal(signal.SIGTERM)
        self.server.wait(60)


def as_messages(question) -> list[dict]:
    """OpenAI's messages of a question, its parts in the order of the marks."""
    images = iter(question.images)

    def parts(text: str) -> list[dict]:
        content: list[dict] = []
        for number, words in enumerate(text.split("<image>")):
            if number:
                data = base64.b64encode(next(images).read_bytes()).decode()
                url = {"url": f"data:image/jpeg;base64,{data}"}
                content.append({"type": "image_url", "image_url": url})
            if words:
                content.append({"type": "text", "text": words})
        return content

    messages: list[dict] = []
    for asked, answer in question.history:
        messages.append({"role": "user", "content": parts(asked)})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": parts(question.text)}]


def post(url: str, body: dict) -> dict:
    content = json.dumps({"model": "croc", **body}).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
