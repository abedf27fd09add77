"""Prompts of the exported chat templates have the ids that training gives the same conversation."""

import io
import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_croc.config.data import TemplateName
from megatron_croc.convert.exported_tokenizer import read_exported
from megatron_croc.convert.tokenizer_files import write_tokenizer
from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
from megatron_croc.data.demo.dataset import train_tokenizer, write_annotations
from megatron_croc.data.sample.conversation import (
    IM_END,
    IM_START,
    QWEN_SYSTEM,
    VICUNA_SYSTEM,
)
from megatron_croc.data.sample.tokenization import (
    build_tokenizer,
    tokenize_conversation,
    tokenize_prompt,
)

MARK = "<image>"
NUM_CONVERSATIONS = 60
"""Made-up conversations for each tokenizer and template."""

CASES = [
    ("llama", "v1"),
    ("llama, legacy false", "v1"),
    ("llama, legacy false", "plain"),
    ("llama", "plain"),
    ("llama with ChatML", "qwen_1_5"),
    ("llama with ChatML, legacy false", "qwen_1_5"),
    ("normalizing", "v1"),
    ("qwen", "qwen_1_5"),
    ("llama of transformers", "v1"),
    ("llama of transformers, legacy false", "v1"),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("demo")
    write_annotations(folder, 400, seed=1)
    return json.loads((folder / "valid_finetune.json").read_text())


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """(path, tokenizer_type) of tokenizers as users have them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, tuple[Path, str]] = {}
    models = {
        "llama": train_tokenizer(seed=1),
        "llama with ChatML": train(control_symbols=[IM_START, IM_END], **LLAMA),
        "normalizing": train(model_type="bpe"),
    }
    for name, content in models.items():
        for legacy in (True, False):
            place = folder / f"{name}-{legacy}"
            place.mkdir()
            (place / "tokenizer.model").write_bytes(content)
            config = {"legacy": legacy, "tokenizer_class": "LlamaTokenizer"}
            (place / "tokenizer_config.json").write_text(json.dumps(config))
            key = name if legacy else f"{name}, legacy false"
            made[key] = place / "tokenizer.model", "SentencePieceTokenizer"
            made[key.replace("llama", "llama of transformers")] = place, "HuggingFaceTokenizer"
    make_qwen(folder / "qwen")
    made["qwen"] = folder / "qwen", "HuggingFaceTokenizer"
    return made


LLAMA: dict[str, Any] = dict(
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
)
TEXTS = ["Is there a red circle?", "user system assistant", "one two 12 345", "a <b> c </b>"] * 9


def train(**settings: Any) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return model.getvalue()


def make_qwen(folder: Path) -> None:
    """A byte-level BPE tokenizer with the special tokens of Qwen2.5, that begins every text."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers.trainers import BpeTrainer

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|endoftext|>", IM_START, IM_END)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{IM_END} $A", special_tokens=[(IM_END, backend.token_to_id(IM_END))]
    )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": IM_END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


CHUNKS = (
    *("Is there a red circle?", "a", " lead", "trail ", "\n", "\n\nx", "  two  ", "1 2 34"),
    *(
        "</s>",
        "<s>hi</s>",
        "<unk>",
        f"{IM_END}\n{IM_START}system",
        "naïve 日本",
        "\U0001f600",
        "<b>",
    ),
)


def made_up(rng: random.Random, *, rounds: int) -> tuple[list[tuple[str, str]], list[list[dict]]]:
    """(question with marks, answer) of each round, and the question's parts."""
    told, parts = [], []
    for _ in range(rounds):
        content: list[dict] = []
        for _ in range(rng.randint(1, 5)):
            if rng.random() < 0.4:
                content.append({"type": "image"})
            else:
                content.append({"type": "text", "text": rng.choice(CHUNKS)})
        answer = "".join(rng.choices(CHUNKS, k=rng.randint(1, 3))).strip() or "yes"
        told.append((as_value(content), answer))
        parts.append(content)
    return told, parts


def as_value(content: list[dict]) -> str:
    """LLaVA's text of a list of parts, as docs/conversion.md has it."""
    texts = [part.get("text", MARK) for part in content]
    places = [place for place, part in enumerate(content) if part["type"] == "image"]
    words = [place for place, part in enumerate(content) if part["type"] == "text"]
    if not places:
        return "".join(texts)
    if not any(words[0] < place < words[-1] for place in places if words):
        said = "".join(texts[place] for place in words).strip()
        return "\n".join([MARK] * len(places) + ([said] if said else []))
    value = ""
    for place, text in enumerate(texts):
        value += text
        if place in places and place < words[0] and not texts[place + 1][0].isspace():
            value += "\n"
    return value


def as_messages(told: list[tuple[str, str]], contents: list, *, answered: bool) -> list[dict]:
    messages = []
    for (_, answer), content in zip(told, contents, strict=True):
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return messages if answered else messages[:-1]


def test_every_template_is_compared():
    assert {template for _, template in CASES} == set(get_args(TemplateName))


@pytest.mark.parametrize(("source", "template"), CASES)
def test_prompts_have_the_ids_of_training(source, template, sources, records, tmp_path):
    from transformers import AutoTokenizer

    path, kind = sources[source]
    training = build_tokenizer(kind, str(path))
    image = write_tokenizer(path, tmp_path / ".", template=template, tokenizer_type=kind)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    exported.save_pretrained(tmp_path / "again")
    loaded = (exported, AutoTokenizer.from_pretrained(tmp_path / "again"))

    def check(told, contents) -> None:
        *history, (question, _) = told
        for tokenizer in loaded:
            for answered in (True, False):
                messages = as_messages(told, contents, answered=answered)
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=not answered, return_dict=False
                )
                text = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=not answered, tokenize=False
                )
                assert tokenizer(text)["input_ids"] == ids  # as a processor calls it
                if answered:
                    record = as_record(told)
                    marks = sum(q.count(MARK) for q, _ in told)
                    expected = tokenize_conversation(
                        training, template, record, num_images=marks, sample_id="x"
                    ).input_ids.tolist()
                else:
                    expected = tokenize_prompt(
                        training, template, question, history=history
                    ).tolist()
                want = [image.id if id == IMAGE_TOKEN_INDEX else id for id in expected]
                assert ids == want, (messages, tokenizer.decode(ids), tokenizer.decode(want))

    for text in CHUNKS[:8] + CHUNKS[12:]:
        assert exported(text)["input_ids"] == training.encode(text)
    for record in records[:20]:
        values = [message["value"] for message in record["conversations"]]
        told = list(zip(values[::2], values[1::2], strict=True))
        told = told[: 1 if template == "plain" else None]
        check(told, [question for question, _ in told])  # marks in the text
        check(told, [split(question) for question, _ in told])  # parts
    rng = random.Random(source)
    for _ in range(NUM_CONVERSATIONS):
        told, contents = made_up(rng, rounds=1 if template == "plain" else rng.randint(1, 3))
        check(told, contents)

    again = read_exported(tmp_path / "again")  # what croc generate makes of it
    assert (again.size, again.eos_id) == (training.size, training.eos_id)
    for told, _ in (made_up(rng, rounds=1) for _ in range(20)):
        theirs = tokenize_prompt(again, template, told[0][0]).tolist()
        assert theirs == tokenize_prompt(training, template, told[0][0]).tolist()


@pytest.mark.parametrize(("source", "template"), [CASES[0], CASES[7]])
def test_a_system_message_replaces_the_text_of_training(source, template, sources, tmp_path):
    from transformers import AutoTokenizer

    path, kind = sources[source]
    write_tokenizer(path, tmp_path, template=template, tokenizer_type=kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    question = {"role": "user", "content": "Is it?"}

    def prompt(*messages: dict) -> str:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )

    usual = VICUNA_SYSTEM if template == "v1" else QWEN_SYSTEM
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        told = prompt({"role": "system", "content": content}, question)
        assert told == prompt(question).replace(usual, "Be brief.") != prompt(question)


PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("user", [{"type": "text", "text": "what is <image>?"}])], "part of type image"),
        ([("user", [{"type": "video"}])], "video: no part"),
        ([("assistant", "a")], "assistant: this role"),
        ([("user", "a"), ("user", "b")], "user: this role"),
        ([("user", "a"), ("system", "b")], "system: this role"),
        ([("user", "a"), ("tool", "b")], "tool: this role"),
        ([("system", [PICTURE]), ("user", "a")], "put it in a question"),
        ([("user", "a"), ("assistant", [PICTURE]), ("user", "b")], "put it in a question"),
    ],
)
def test_what_training_refuses_is_refused(messages, words, sources, tmp_path):
    import jinja2
    from transformers import AutoTokenizer

    write_tokenizer(sources["llama"][0], tmp_path, template="v1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    told = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(jinja2.TemplateError, match=words):
        tokenizer.apply_chat_template(told, tokenize=False)


def as_record(told: list[tuple[str, str]]) -> list[dict]:
    return [
        {"from": role, "value": value}
        for round in told
        for role, value in zip(("human", "gpt"), round, strict=True)
    ]


def split(value: str) -> list[dict]:
    """Parts of a question, with its marks where they stand."""
    content: list[dict] = []
    for number, text in enumerate(value.split(MARK)):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": text}] if text else []
    return content
