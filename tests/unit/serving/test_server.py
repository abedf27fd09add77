"""croc serve: the command it runs, and the folders and environments that it refuses."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_croc.cli.serve import main
from megatron_croc.convert.export_config import croc_config
from megatron_croc.convert.tokenizer_files import write_tokenizer
from megatron_croc.data.demo.dataset import train_tokenizer
from tests.support.synthetic import tiny_run


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """Everything of an export but its weights, which the command does not read."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "given.model").write_bytes(train_tokenizer(seed=1))
    image = write_tokenizer(folder / "given.model", folder, template="v1")
    run = tiny_run("finetune", vocab_size=512)
    config = croc_config(run.model, run.data, torch.float32, image.id)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_command_and_the_example(export, capsys):
    more = ["--", "--dtype", "float32", "--max-model-len=64"]
    assert main([str(export), "--port", "8123", "--name", "c", "--dry-run", *more]) == 0
    command, *_, example = capsys.readouterr().out.strip().splitlines()
    assert command.startswith(f"vllm serve {export} --host 127.0.0.1 --port 8123 ")
    assert "--served-model-name c " in command
    assert "--chat-template-content-format openai" in command
    assert command.endswith("--dtype float32 --max-model-len=64")
    assert command.count("--max-model-len") == 1  # the user's own
    assert "http://127.0.0.1:8123/v1/chat/completions" in example
    body = example.split(" -d '", 1)[1].rstrip("'").replace("'$(base64 -w0 a.jpg)'", "x")
    assert json.loads(body)["messages"][0]["content"][0]["type"] == "image_url"


def change(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: change(f, "config.json", projector_hidden_act="gelu"), "an older version"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer of this program"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat_template.jinja"),
        (lambda f: change(f, "tokenizer.json", normalizer=None), "no tokenizer of this program"),
        (lambda f: change(f, "config.json", croc_settings=None), "has no croc_settings"),
        (lambda f: change(f, "config.json", model_type="llava"), "not an export"),
    ],
)
def test_folders_that_would_answer_wrongly(spoil, words, export, tmp_path, capsys):
    bad = Path(shutil.copytree(export, tmp_path / "bad"))
    spoil(bad)
    assert main([str(bad), "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_environments_without_vllm_or_the_plugin(export, tmp_path, capsys):
    assert main([str(export), "--vllm", str(tmp_path / "none")]) == 1
    assert "no such program" in capsys.readouterr().err
    for name in ("vllm", "python"):  # an environment whose python knows no plugin
        (tmp_path / name).write_text("#!/bin/sh\necho False\n")
        (tmp_path / name).chmod(0o755)
    assert main([str(export), "--vllm", str(tmp_path / "vllm")]) == 1
    assert "pip install --no-deps megatron-croc" in capsys.readouterr().err


def test_the_servers_exit_status_is_returned(tmp_path):
    from megatron_croc.serving.server import run_server

    assert run_server([sys.executable, "-c", "raise SystemExit(3)"]) == 3
