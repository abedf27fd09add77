r"""Chat templates of an export: messages -> text whose ids are those of training.

    messages --Jinja--> text with `<image>` marks --tokenizer.json--> ids, as data/sample gives them

A message's content is a text (with `<image>` marks, as in LLaVA's records) or a list of parts, each
{"type": "text"} or {"type": "image"}. Parts become LLaVA's text first:

    one image             is put before the text (training's rule, also for a text with one mark)
    several images, all before or all after the text: are put before it, each on a line
    several images among the text: keep their places

A system message in the first place replaces the system text of training. Text that spells a special
token ("</s>") is ordinary text in training; ESCAPE inside it keeps the tokenizer from finding the
token, and is removed by its normalizer. Messages that training refuses are refused.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_croc.config.data import TemplateName
from megatron_croc.convert.export_config import IMAGE_TOKEN
from megatron_croc.data.sample.conversation import IM_END, IM_START, QWEN_SYSTEM, VICUNA_SYSTEM

ESCAPE = "\ufdd0"
"""A code point that is no character in Unicode; it splits the text of a special token."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """Facts about the tokenizer that a template needs."""

    bos: str = ""
    eos: str = ""
    specials: Sequence[str] = ()
    """Texts of the special tokens, without IMAGE_TOKEN."""

    writes_prefix: bool = False
    """True if the template writes the space before a text at the start and after an image."""

    doubles_space: bool = True
    """True if that space is also written before a text that begins with a space."""


_FAULTS = {
    "MARK_IN_TEXT": f"a text holds {IMAGE_TOKEN}: give an image as a part of type image",
    "UNKNOWN_PART": ": no part of a message has this type; give parts of type text or image",
    "MISPLACED": "an image stands in a system message or an answer: put it in a question",
    "ROLES": ": this role stands in the wrong place; user and assistant alternate, user first, and "
    "a system message stands before them",
    "ONLY_CAPTIONS": "the model was trained with template plain: it gives a caption to the images "
    "of one question, and knows no system message",
}


def chat_template(template: TemplateName, words: Words) -> str:
    """Build the Jinja template of a conversation template."""
    body = {"v1": _V1, "plain": _PLAIN, "qwen_1_5": _QWEN}[template]
    names = {
        "IMAGE": IMAGE_TOKEN,
        "BOS": words.bos,
        "EOS": words.eos,
        "IM_START": IM_START,
        "IM_END": IM_END,
        "VICUNA_SYSTEM": VICUNA_SYSTEM,
        "QWEN_SYSTEM": QWEN_SYSTEM,
        **_FAULTS,
    }
    constants = "".join(
        f"{{%- set {name} = {_quote(value)} -%}}\n"
        for name, value in names.items()
        if name in _MACROS + body
    )
    escapes = "".join(
        f" | replace({_quote(token)}, {_quote(token[0] + ESCAPE + token[1:])})"
        for token in words.specials
        if len(token) > 1 and token != IMAGE_TOKEN
    )
    space = "' '"
    if not words.doubles_space:
        space = "('' if chunk.startswith(' ') else ' ')"
    prefix = f"{{{{- {space} if at_start -}}}}" if words.writes_prefix else ""
    code = (_MACROS + body).replace("ESCAPES", escapes).replace("PREFIX", prefix)
    return constants + code.rstrip("\n")


def _quote(text: str) -> str:
    """Write a text as a string of Jinja."""
    return json.dumps(text, ensure_ascii=False).replace(ESCAPE, f"\\u{ord(ESCAPE):x}")


# value: content -> text as in LLaVA's records. question: a single mark is put first. joined: text
# around marks gets the prefix that training gives it. Every tag removes the white space around it
# (-), so only {{- -}} writes. Engines see from value(message['content']) that parts are understood.
_MACROS = """\
{%- macro value(content) -%}
{%- if content is string -%}{{- contentESCAPES -}}
{%- elif content -%}
    {%- set ns = namespace(text='', inline='', images=0, placed=false, waiting=false) -%}
    {%- for part in content -%}
        {%- if part['type'] == 'text' and part['text'] -%}
            {%- if IMAGE in part['text'] -%}
                {{- raise_exception(MARK_IN_TEXT) -}}
            {%- endif -%}
            {%- if ns.text and ns.waiting -%}{%- set ns.placed = true -%}{%- endif -%}
            {%- set ns.waiting = false -%}
            {%- set ns.text = ns.text + part['text'] -%}
            {%- set ns.inline = ns.inline + part['text'] -%}
        {%- elif part['type'] in ('image', 'image_url') -%}
            {%- set ns.images = ns.images + 1 -%}
            {%- if ns.text -%}{%- set ns.waiting = true -%}{%- endif -%}
            {%- set following = content[loop.index] if not loop.last else {} -%}
            {%- set spaced = following['text'] and following['text'][0] in ' \\n\\t' -%}
            {%- set ns.inline = ns.inline + IMAGE + ('' if ns.text or spaced else '\\n') -%}
        {%- elif part['type'] != 'text' -%}
            {{- raise_exception(part['type'] + UNKNOWN_PART) -}}
        {%- endif -%}
    {%- endfor -%}
    {%- set text = ns.textESCAPES -%}
    {%- if ns.images == 0 -%}{{- text -}}
    {%- elif ns.placed -%}{{- ns.inlineESCAPES -}}
    {%- else -%}{{- ((IMAGE + '\\n') * ns.images + text | trim) | trim -}}
    {%- endif -%}
{%- endif -%}
{%- endmacro -%}
{%- macro question(text) -%}
{%- if text.split(IMAGE) | length == 2 -%}
    {{- (IMAGE + '\\n' + text.replace(IMAGE, '') | trim) | trim -}}
{%- else -%}{{- text -}}
{%- endif -%}
{%- endmacro -%}
{%- macro words_only(text) -%}
{%- if IMAGE in text -%}
    {{- raise_exception(MISPLACED) -}}
{%- endif -%}
{{- text -}}
{%- endmacro -%}
{%- macro joined(text, at_start) -%}
{%- for chunk in text.split(IMAGE) -%}
    {%- if not loop.first -%}{{- IMAGE -}}{%- set at_start = true -%}{%- endif -%}
    {%- if chunk -%}PREFIX{{- chunk -}}{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- set rounds = messages[1:] if has_system else messages -%}
{%- for message in rounds -%}
{%- if message['role'] != ('user' if loop.index is odd else 'assistant') -%}
    {{- raise_exception(message['role'] + ROLES) -}}
{%- endif -%}
{%- endfor -%}
"""

_V1 = """\
{%- set ns = namespace(before=VICUNA_SYSTEM + ' ', first=true) -%}
{{- BOS -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
    {%- set ns.before = words_only(value(message['content'])) + ' ' -%}
{%- elif message['role'] == 'user' -%}
    {%- set after = ' ASSISTANT:' if add_generation_prompt or not loop.last else '' -%}
    {{- joined(ns.before + 'USER: ' + question(value(message['content'])) + after, ns.first) -}}
    {%- set ns.before = '' -%}{%- set ns.first = false -%}
{%- else -%}
    {%- set answer = words_only(value(message['content'])) -%}
    {%- if answer -%}{{- ' ' + answer + EOS -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""

_PLAIN = """\
{%- if rounds | length != messages | length or rounds | length > 2 -%}
    {{- raise_exception(ONLY_CAPTIONS) -}}
{%- endif -%}
{{- BOS -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
    {{- IMAGE * (value(message['content']).split(IMAGE) | length - 1) -}}
{%- else -%}
    {%- set caption = words_only(value(message['content'])) -%}
    {%- if caption -%}{{- joined(caption + '\\n', true) -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""

_QWEN = """\
{%- set ns = namespace(system=QWEN_SYSTEM) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
    {%- set ns.system = words_only(value(message['content'])) -%}
{%- endif -%}
{%- endfor -%}
{{- IM_START + 'system\\n' + ns.system + IM_END + '\\n' -}}
{%- for message in rounds -%}
{%- if message['role'] == 'user' -%}
    {%- set asked = question(value(message['content'])) -%}
    {{- IM_START + joined('user\\n' + asked, false) + IM_END + '\\n' -}}
{%- else -%}
    {%- set answer = words_only(value(message['content'])) -%}
    {{- IM_START + 'assistant\\n' + answer -}}
    {%- if answer -%}{{- IM_END + '\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- IM_START + 'assistant\\n' -}}{%- endif -%}
"""
