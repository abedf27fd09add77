r"""Conversation templates: messages -> parts of text, special tokens and images.

    [{"from": "human", "value": "what is it?\n<image>"}, {"from": "gpt", "value": "a car"}]
                                          |  v1
    bos | "A chat ... USER: " | IMAGE | "\nwhat is it? ASSISTANT:" | " a car" | eos
                                                                     ~~~~~~~~   ~~~  supervised

Special tokens come from the template only: "</s>" in a message is ordinary text.
The three templates give the released code's token ids and labels (LLaVA's preprocess_plain and
preprocess_v1, ViCToR's preprocess_qwen).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_croc.config.data import TemplateName
from megatron_croc.data.bad_samples import BadSampleError

IMAGE_MARK = "<image>"
"""Mark of one image in a message."""

BOS, EOS = "bos", "eos"
"""Names of special tokens; each tokenizer maps them to its own ids."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_SYSTEM = "You are a helpful assistant."
IM_START, IM_END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Text:
    """Ordinary text; the model is trained to predict supervised text."""

    text: str
    supervised: bool = False

    role: str = ""
    """Beginning of a supervised text that names the turn's role and is no part of the answer."""


@dataclass(frozen=True)
class Special:
    """One special token: BOS, EOS, or a token of the vocabulary by its own name."""

    name: str
    supervised: bool = False


@dataclass(frozen=True)
class Image:
    """Place of the visual tokens of the sample's next image."""


Part = Text | Special | Image


@dataclass(frozen=True, kw_only=True)
class Template:
    """Format of a conversation as text."""

    specials: tuple[str, ...]
    """Special tokens the tokenizer must have."""

    render: Callable[[Sequence[tuple[str, str]]], list[Part]]
    """(question, answer) pairs -> parts; with an empty last answer, the prompt of a reply."""

    supervised_tokens: tuple[str, ...] = ()
    """Texts of tokens that are always supervised, also in questions."""


def check_conversation(messages: object, *, num_images: int, sample_id: str) -> None:
    """Refuse a conversation that cannot be trained on.

    Args:
        messages: LLaVA's list of {"from": "human" | "gpt", "value": text}.
        num_images: number of images of the sample; each needs one <image> mark in a question.
        sample_id: name used in errors.

    Raises:
        BadSampleError: not a list of messages; unknown role; roles do not alternate; an answer is
            missing or empty; numbers of marks and images differ; or a mark is in an answer.
    """
    if not isinstance(messages, list) or not messages:
        raise BadSampleError(
            sample_id, "record", f"conversations must be a non-empty list, got {messages!r:.80}"
        )
    for turn, message in enumerate(messages):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("from"), str)
            and isinstance(message.get("value"), str)
        ):
            raise BadSampleError(
                sample_id,
                "record",
                f'message {turn} must have the texts "from" and "value", got {message!r:.80}',
            )
        role, expected = message["from"], ("human", "gpt")[turn % 2]
        if role not in ("human", "gpt"):
            raise BadSampleError(
                sample_id, "roles", f"message {turn} is from {role!r}; roles are human and gpt"
            )
        if role != expected:
            raise BadSampleError(
                sample_id,
                "roles",
                f"message {turn} is from {role}, expected {expected}: questions and answers "
                "must alternate, a question first; join or remove the message",
            )
        if not is_unicode(message["value"]):
            raise BadSampleError(
                sample_id, "record", f"message {turn} holds half of a surrogate pair: no Unicode"
            )
        if role == "gpt" and not message["value"].strip():
            raise BadSampleError(sample_id, "no_answer", f"the answer in message {turn} is empty")
    if len(messages) % 2:
        raise BadSampleError(sample_id, "no_answer", "the last question has no answer: remove it")
    in_questions, in_answers = (
        sum(message["value"].count(IMAGE_MARK) for message in messages[first::2])
        for first in (0, 1)
    )
    if in_answers:
        raise BadSampleError(
            sample_id,
            "image_marks",
            f"{in_answers} {IMAGE_MARK} mark(s) inside an answer: remove them",
        )
    if in_questions != num_images:
        raise BadSampleError(
            sample_id,
            "image_marks",
            f"{in_questions} {IMAGE_MARK} mark(s) for {num_images} image(s): write one for each "
            "image, in a question",
        )


def is_unicode(text: str) -> bool:
    r"""Return True if a text can be encoded as UTF-8; a lone surrogate such as \ud800 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def render_conversation(
    template: TemplateName, messages: object, *, num_images: int, sample_id: str
) -> list[Part]:
    """Check a conversation and format it with a template.

    Returns:
        Parts in order; no Text is empty.

    Raises:
        BadSampleError: see check_conversation; also `plain` with more than one answer.
    """
    check_conversation(messages, num_images=num_images, sample_id=sample_id)
    assert isinstance(messages, list)
    values = [message["value"] for message in messages]
    rounds = list(zip(values[::2], values[1::2], strict=True))
    if template == "plain" and len(rounds) != 1:
        raise BadSampleError(
            sample_id, "roles", f"template plain takes one caption, got {len(rounds)} answers"
        )
    return TEMPLATES[template].render(rounds)


def render_prompt(
    template: TemplateName, question: str, *, history: Sequence[tuple[str, str]] = ()
) -> list[Part]:
    """Format the prompt of an answer.

    Args:
        template: name of the template.
        question: the question to answer.
        history: earlier questions and answers; none with `plain`, which drops the question.
    """
    return TEMPLATES[template].render([*history, (question, "")])


def parts_as_text(parts: Sequence[Part], *, bos: str = "<s>", eos: str = "</s>") -> str:
    """Format parts as readable text."""
    names = {BOS: bos, EOS: eos}
    return "".join(
        part.text
        if isinstance(part, Text)
        else names.get(part.name, part.name)
        if isinstance(part, Special)
        else IMAGE_MARK
        for part in parts
    )


def _mark_first(question: str) -> str:
    """Move a single mark to the front (LLaVA's rule).

    Several marks keep their places, as the words between them may refer to one image each.
    """
    if question.count(IMAGE_MARK) != 1:
        return question
    return f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, '').strip()}".strip()


def _split_images(text: str) -> list[Part]:
    """Split unsupervised text at its marks into texts and images."""
    parts: list[Part] = []
    for index, chunk in enumerate(text.split(IMAGE_MARK)):
        if index:
            parts.append(Image())
        if chunk:
            parts.append(Text(chunk))
    return parts


def _render_plain(rounds: Sequence[tuple[str, str]]) -> list[Part]:
    question, caption = rounds[0]
    images: list[Part] = [Image()] * question.count(IMAGE_MARK)
    answer: list[Part] = [Text(caption + "\n", supervised=True)] if caption else []
    return [Special(BOS), *images, *answer]


def _render_v1(rounds: Sequence[tuple[str, str]]) -> list[Part]:
    parts: list[Part] = [Special(BOS)]
    before = VICUNA_SYSTEM + " "
    for question, answer in rounds:
        parts += _split_images(f"{before}USER: {_mark_first(question)} ASSISTANT:")
        if answer:
            parts += [Text(" " + answer, supervised=True), Special(EOS, supervised=True)]
        before = ""
    return parts


def _render_qwen(rounds: Sequence[tuple[str, str]]) -> list[Part]:
    # ViCToR supervises the tokens around every turn, and the whole answer turn with its role.
    start, end = Special(IM_START, supervised=True), Special(IM_END, supervised=True)
    parts: list[Part] = [start, Text(f"system\n{QWEN_SYSTEM}"), end, Text("\n")]
    for question, answer in rounds:
        parts += [start, *_split_images(f"user\n{_mark_first(question)}"), end, Text("\n")]
        parts += [start, Text(f"assistant\n{answer}", supervised=True, role="assistant\n")]
        if answer:
            parts += [end, Text("\n")]
    return parts


TEMPLATES: dict[TemplateName, Template] = {
    "plain": Template(specials=(BOS,), render=_render_plain),
    "v1": Template(specials=(BOS, EOS), render=_render_v1),
    "qwen_1_5": Template(
        specials=(IM_START, IM_END), render=_render_qwen, supervised_tokens=("\n",)
    ),
}
