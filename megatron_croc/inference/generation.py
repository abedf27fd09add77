"""Generate answers with a trained model: an export, or a checkpoint that is exported first.

    checkpoint --export--> temporary folder --+
    export ------------------------------------+--> Generator.answer(questions) -> Answer, ...

Prompts are those of evaluation/prompts.py. Sequences of a batch are padded on the left and do not
attend to each other.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_croc.config.data import DataConfig
from megatron_croc.convert.configs import EXPORT, RELEASES, read_conversation, read_export
from megatron_croc.convert.export_loader import load_export
from megatron_croc.convert.exported_tokenizer import is_own_tokenizer, read_exported
from megatron_croc.convert.tensor_files import read_json
from megatron_croc.convert.tokenizer_files import differences
from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.sample.tokenization import (
    Tokenizer,
    build_tokenizer,
    check_tokenizer,
)
from megatron_croc.errors import CheckpointError, ConfigError, DataError
from megatron_croc.evaluation.prompts import Answer, Prompts
from megatron_croc.evaluation.questions import Question


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice of tokens and of the length of answers."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """Temperature of sampling; 0: always the most likely token."""

    top_p: float = 1.0
    """Sample from the most likely tokens with this total probability."""

    top_k: int = 0
    """Sample from this number of most likely tokens; 0: all."""

    seed: int = 1234
    use_cache: bool = True
    """Keep keys and values of earlier tokens; False: compute all tokens again for each new one."""

    def __post_init__(self) -> None:
        """Check the values."""
        faults = {
            f"max_new_tokens={self.max_new_tokens}: must be positive": self.max_new_tokens < 1,
            f"temperature={self.temperature}: must not be negative": not self.temperature >= 0,
            f"top_p={self.top_p}: must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"top_k={self.top_k}: must not be negative": self.top_k < 0,
            "top_p and top_k need a temperature above 0; it is 0, which takes the most likely "
            "token": self.temperature == 0 and (self.top_p < 1 or self.top_k > 0),
        }
        for fault, is_true in faults.items():
            if is_true:
                raise ConfigError(fault)


class Generator:
    """A loaded model with its tokenizer and image processing."""

    def __init__(
        self, model: Any, folder: Path, data: DataConfig, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        """Args: model: from load_export. data: settings of prompts. device: of the computation."""
        from transformers import GenerationConfig

        self.model = model.to(device)
        self.model.generation_config = GenerationConfig()
        self.device = device
        settings = read_export(folder)
        llm = settings.language_model
        check_tokenizer(tokenizer, data.conversation_template, self._num_rows())
        self.prompts = Prompts(tokenizer, data, vision=settings.vision_tower, llm=llm)
        # Rows of the table without a word, and the image token, are never generated.
        no_words = range(self.prompts.num_words, self._num_rows())
        self.no_words = sorted({*no_words, model.config.image_token_id})

    def _num_rows(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def check(self, questions: Sequence[Question], sampling: Sampling) -> None:
        """Check that all questions fit the model's context, before any is answered.

        Raises:
            DataError: a question is too long; names the first one.
        """
        self.prompts.check(questions, sampling.max_new_tokens)

    def answer(
        self, questions: Sequence[Question], sampling: Sampling, *, batch_size: int = 1
    ) -> Iterator[Answer]:
        """Answer questions in order, batch by batch.

        Random draws depend on the seed and on the number of the batch's first question: another
        batch size samples other tokens.

        Raises:
            DataError: an image does not decode.
        """
        for first in range(0, len(questions), batch_size):
            yield from self._batch(questions[first : first + batch_size], sampling, first)

    def answer_one(self, question: Question, sampling: Sampling, **options: Any) -> Answer:
        """Answer one question as `answer` does; `options` go to transformers' `generate`."""
        return self._batch([question], sampling, 0, **options)[0]

    @torch.no_grad()
    def _batch(
        self, questions: Sequence[Question], sampling: Sampling, first: int, **options: Any
    ) -> list[Answer]:
        inputs = self.inputs(questions)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(sampling.seed + first)
            rows = self.model.generate(
                **inputs, generation_config=self._config(sampling), **options
            )
        new = rows[:, inputs["input_ids"].shape[1] :].tolist()
        return [self.prompts.answer(q, row) for q, row in zip(questions, new, strict=True)]

    def inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Build input_ids and attention_mask (int64 [B, L], left-padded) and pixel_values."""
        prompts = [self.prompts.ids(question) for question in questions]
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), self.prompts.stop_ids[0], dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for row, mask, prompt in zip(ids, seen, prompts, strict=True):
            row[length - len(prompt) :] = torch.from_numpy(prompt)
            mask[length - len(prompt) :] = 1
        ids[ids == IMAGE_TOKEN_INDEX] = self.model.config.image_token_id
        inputs = {"input_ids": ids.to(self.device), "attention_mask": seen.to(self.device)}
        pixels = [image for q in questions for image in self.prompts.pixels(q)]
        if pixels:
            mean, std = (
                torch.tensor(values).view(3, 1, 1)
                for values in (self.prompts.vision.image_mean, self.prompts.vision.image_std)
            )
            normal = (torch.stack(pixels).float() / 255.0 - mean) / std
            inputs["pixel_values"] = normal.to(self.device, self.model.dtype)
        return inputs

    def _config(self, sampling: Sampling) -> Any:
        """Build the generation config from `sampling`; __init__ drops the folder's defaults."""
        from transformers import GenerationConfig

        chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            chosen |= dict(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
            )
        return GenerationConfig(
            **chosen,
            max_new_tokens=sampling.max_new_tokens,
            use_cache=sampling.use_cache,
            eos_token_id=list(self.prompts.stop_ids),
            pad_token_id=self.prompts.stop_ids[0],
            suppress_tokens=self.no_words,
        )


@contextmanager
def open_generator(
    folder: Path,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Generator]:
    """Load a model for generation.

    Args:
        folder: an export, a checkpoint, or a folder of checkpoints (the latest is taken).
        tokenizer: SentencePiece file or Hugging Face directory; None: the export's own, or the one
            the run was trained with.
        dtype: of the computation; None: as stored.
        device: None: the accelerator if there is one, else the CPU.
        trust_remote_code: run the code beside an export's weights even if it is not ours.

    Raises:
        CheckpointError: the folder holds neither an export nor a checkpoint.
        DataError: no tokenizer was found.
    """
    place = torch.device(device) if device is not None else _default_device()
    with as_export(folder, tokenizer) as export:
        data = read_conversation(export)
        words = _open_tokenizer(export, data, tokenizer)
        model = load_export(export, dtype, trust_remote_code=trust_remote_code)
        generator = Generator(model, export, data, words, place)
    yield generator


def _default_device() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


@contextmanager
def as_export(folder: Path, tokenizer: Path | None) -> Iterator[Path]:
    """Yield the folder itself, or a temporary export of the checkpoint in it.

    Args:
        folder: an export, a checkpoint, or a folder of checkpoints.
        tokenizer: of a checkpoint; None: the one the run was trained with.

    Raises:
        CheckpointError: the folder holds neither an export nor a checkpoint.
        DataError: the run's tokenizer is not there.
    """
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("model_type")
        if kind == EXPORT:
            yield folder
            return
        what = "a release" if kind in RELEASES else f"model_type {kind!r}"
        raise CheckpointError(
            f"{folder}: is {what}, not an export of this program; import it first: "
            f"croc convert import --from-hf {folder} --save START"
        )
    from megatron_croc.convert.exporting import export_huggingface, find_checkpoint, read_run

    checkpoint = find_checkpoint(folder)
    if tokenizer is None:
        named = read_run(checkpoint).data.tokenizer_model
        if named is None or not Path(named).exists():
            raise DataError(
                f"{checkpoint}: its tokenizer ({named}) is not there; say where it is with "
                "--tokenizer"
            )
        tokenizer = Path(named)
    with tempfile.TemporaryDirectory(prefix="croc-export-") as temporary:
        export = Path(temporary) / "hf"
        export_huggingface(checkpoint, export, tokenizer=tokenizer)
        yield export


def _open_tokenizer(export: Path, data: DataConfig, given: Path | None) -> Tokenizer:
    """Open the given tokenizer, or the tokenizer of the export."""
    if given is None and is_own_tokenizer(export):
        written = read_exported(export)
        model = export / "tokenizer.model"
        if data.tokenizer_type != "SentencePieceTokenizer" or not model.is_file():
            return written
        return build_tokenizer(data.tokenizer_type, str(model), legacy=written.legacy)
    source = export if given is None else given
    if data.tokenizer_type == "SentencePieceTokenizer" and source.is_dir():
        source = source / "tokenizer.model"
    if not source.exists():
        raise DataError(
            f"{export}: has no tokenizer of this program (exported without one, or saved again by "
            "another library); give the run's with --tokenizer"
        )
    opened = build_tokenizer(data.tokenizer_type, str(source))
    if is_own_tokenizer(export) and (others := differences(opened, read_exported(export))):
        raise DataError(
            f"--tokenizer {source}: is not the tokenizer that {export} was exported with: other "
            f"ids for {others[0]!r}; leave --tokenizer out"
        )
    return opened
