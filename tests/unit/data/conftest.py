"""A small tokenizer and small datasets, made on the spot."""

import io
from pathlib import Path

import pytest
import sentencepiece

from megatron_croc.data.sample.conversation import VICUNA_SYSTEM
from megatron_croc.data.store.shard_writer import ShardWriter, write_manifest
from megatron_croc.recipes.tiny import tiny
from tests.unit.data.small_samples import conversation, jpeg


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory) -> str:
    """LLaMA-like: byte fallback, bos 1, eos 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([VICUNA_SYSTEM, "USER: ASSISTANT: what is a thing number 0"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture
def make_dataset(tmp_path):
    """Write samples with 0, 1 or 2 images; `records` overrides some of them by number."""

    def make(num_samples: int, *, name: str = "set", records: dict | None = None) -> str:
        folder: Path = tmp_path / name
        folder.mkdir()
        infos = []
        for shard, begin in enumerate(range(0, num_samples, 5)):
            with ShardWriter(folder, shard) as writer:
                for number in range(begin, min(begin + 5, num_samples)):
                    num_images = (1, 1, 0, 2)[number % 4]
                    messages = conversation(number, num_images)
                    images = [("jpg", jpeg(10 * number + i)) for i in range(num_images)]
                    messages, images = (records or {}).get(number, (messages, images))
                    writer.add({"conversations": messages}, images)
            infos.append(writer.info)
        write_manifest(folder, infos)
        return str(folder)

    return make


@pytest.fixture
def make_run(tokenizer_model):
    """A tiny run on given folders."""

    def make(*data_path: str, micro_batch_size: int = 2, global_batch_size: int = 8):
        run = tiny("pretrain_croc")
        run.data.data_path = run.data.valid_data_path = data_path
        # Tars that a test has indexed in place lie beside the folder.
        run.data.data_roots = tuple(path.rpartition("/")[0] for path in data_path)
        run.data.tokenizer_model = tokenizer_model
        run.data.image_decoder = "pil"
        run.training.micro_batch_size = micro_batch_size
        run.training.global_batch_size = global_batch_size
        run.data.max_bad_fraction = 0.5
        return run

    return make
