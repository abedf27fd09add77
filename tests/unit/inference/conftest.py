"""A tiny random model to talk to."""

from pathlib import Path

import pytest

from megatron_croc.data.demo.small import write_demo
from tests.support.distributed import run_distributed


@pytest.fixture(scope="session")
def chat_demo(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo"), ())


@pytest.fixture(scope="session")
def chat_export(chat_demo: Path, tmp_path_factory) -> Path:
    from megatron_croc.convert.exporting import export_huggingface
    from tests.unit.inference.test_generation import save_random

    save, out = (tmp_path_factory.mktemp("chat") / name for name in ("save", "hf"))
    run_distributed(save_random, 1, chat_demo, save, {})
    export_huggingface(save, out, tokenizer=chat_demo / "tokenizer.model")
    return out


@pytest.fixture(scope="session")
def chat_generator(chat_export: Path):
    from megatron_croc.inference.generation import open_generator

    with open_generator(chat_export, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="session")
def chat_image(chat_demo: Path) -> Path:
    return sorted(path for path in (chat_demo / "images").iterdir() if path.is_file())[0]
