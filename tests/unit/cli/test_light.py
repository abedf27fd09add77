"""Commands that need no model import no heavy library, and a wrong option is one line."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from megatron_croc.cli.main import COMMANDS, main
from megatron_croc.config.base import changes_from_words
from megatron_croc.config.run import RunConfig
from megatron_croc.convert.tensor_files import read_json
from megatron_croc.errors import CheckpointError

ROOT = Path(__file__).parents[3]

PROGRAM = """
import contextlib, io, json, sys
from megatron_croc.cli.main import main
found = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    heavy = [name for name in ("torch", "megatron.core", "transformers") if name in sys.modules]
    found[" ".join(words)] = [status, heavy]
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "megatron")]:
        del sys.modules[name]
print(json.dumps(found))
"""


def write_language_model(folder: Path) -> Path:
    """Write a language model of no tensors, as a download holds it."""
    folder.mkdir()
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = dict(model_type="llama", intermediate_size=128, vocab_size=512, **sizes)
    (folder / "config.json").write_text(json.dumps(config))
    header = b'{"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(12)
    )
    return folder


def test_light_commands_import_no_heavy_library(tmp_path: Path) -> None:
    calls = [[*name.split(), "--help"] for name in COMMANDS]
    calls += [
        ["check", "--recipe", "tiny/finetune", "--world-size", "1"],
        ["plan", "--recipe", "tiny/finetune", "--gpus", "1"],
        ["convert", "inspect", str(write_language_model(tmp_path / "llm"))],
        ["checkpoint", "verify", str(tmp_path)],
        ["monitor", str(tmp_path), "--once"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert {words: heavy for words, (_, heavy) in found.items() if heavy} == {}
    assert found[f"convert inspect {tmp_path / 'llm'}"][0] == 0


def test_inspect_describes_a_language_model_alone(tmp_path: Path, capsys) -> None:
    assert main(["convert", "inspect", str(write_language_model(tmp_path / "llm"))]) == 0
    shown = capsys.readouterr().out
    assert "w  bfloat16  [2, 3]\n1 tensors, 6 numbers" in shown
    assert "vocab_size: 512" in shown
    assert shown.endswith("croc convert import --vision DIR adds a vision tower\n")


def test_a_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: No such file or directory$"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("generate --model x --max-new-token 3", "did you mean --max-new-tokens?"),
        ("convert export --load a --to b --tokeniser c", "did you mean --tokenizer?"),
        ("monitor run --onse", "did you mean --once?"),
        ("report", "croc report --help shows the options"),
        ("report run --zzzzzz", "croc report --help shows the options"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_nearest(words: str, told: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: croc") and told in error and error.count("\n") == 1


class Parsed(Exception):
    """The words of an example, parsed; stops the command before it does anything."""


def examples(name: str, text: str) -> list[list[str]]:
    """Words of every example of a command in its help."""
    joined = re.sub(r"\\?\\\n *", " ", text)
    lines = re.findall(rf"(?:(?:^ *|: )croc|-m megatron_croc) ({name}\b.*)", joined, re.M)
    found = []
    for line in lines:
        line = re.split(r" #| {6,}", line)[0].replace("[", " ").replace("]", " ")
        words = [word for word in shlex.split(line) if word not in ("...", "|")]
        found.append(words[len(name.split()) :])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_of_a_help_parses(name: str, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    text = capsys.readouterr().out.split("\noptions:")[0].split("\n\n", 1)[1]
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *words, **named):
        options, rest = parse(self, *words, **named)
        if " ".join(["croc", name]) != self.prog and name != "data index":
            return options, rest  # of a subcommand such as `croc convert import`
        raise Parsed(rest)

    module = import_module("megatron_croc.cli." + COMMANDS[name][0].split(":")[0])
    function = getattr(module, COMMANDS[name][0].split(":")[1])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    shown = [words for words in examples(name, text) if words != ["--published"]]
    assert shown
    for words in shown:
        with pytest.raises(Parsed) as parsed:
            function(words)
        faults: list[str] = []
        changes_from_words(RunConfig, parsed.value.args[0], faults)
        assert faults == [], words
