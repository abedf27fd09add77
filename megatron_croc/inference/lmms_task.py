"""Write a local task as a task of lmms-eval: YAML, questions, and functions that read them.

    FOLDER/NAME/NAME.yaml, questions.jsonl, utils.py

lmms-eval judges the answers with its own code, so its numbers are a second opinion on `croc eval`.
Images stay where they are.
"""

import json
from pathlib import Path
from typing import Any

from megatron_croc.data.sample.conversation import IMAGE_MARK
from megatron_croc.errors import ConfigError
from megatron_croc.evaluation.metrics import Kind
from megatron_croc.evaluation.questions import Question
from megatron_croc.evaluation.tasks import EvalTask

_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_messages: !function utils.doc_to_messages
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: {target}
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
{judge}
metadata:
  - version: 0.0
"""

_EXACT_MATCH = """\
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true"""

_POPE_METRICS = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")

_JUDGES: dict[Kind, str] = {
    "exact_match": _EXACT_MATCH,
    "vqa": f"process_results: !function utils.vqav2_process_results_val\n{_EXACT_MATCH}",
    "pope": "process_results: !function utils.pope_process_results\nmetric_list:\n"
    + "\n".join(
        f"  - metric: pope_{name}\n    aggregation: !function utils.pope_aggregate_{name}\n"
        "    higher_is_better: true"
        for name in _POPE_METRICS
    ),
}

_IMPORTS: dict[Kind, str] = {
    "exact_match": "",
    "vqa": "from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val  # noqa: F401\n",
    "pope": "from lmms_eval.tasks.pope.utils import (  # noqa: F401\n"
    + "".join(f"    pope_aggregate_{name},\n" for name in _POPE_METRICS)
    + "    pope_process_results,\n)\n",
}

_UTILS = '''\
"""Questions of a local task, for lmms-eval; written by croc lmms-task."""

{imports}from PIL import Image

MARK = {mark!r}


def _parts(text, images):
    parts = []
    for number, words in enumerate(text.split(MARK)):
        if number:
            parts.append({{"type": "image", "url": next(images)}})
        if words:
            parts.append({{"type": "text", "text": words}})
    return parts


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    images = iter(doc["images"])
    messages = []
    for question, answer in zip(doc["past_questions"], doc["past_answers"]):
        messages.append({{"role": "user", "content": _parts(question, images)}})
        said = [{{"type": "text", "text": answer}}]
        messages.append({{"role": "assistant", "content": said}})
    return [*messages, {{"role": "user", "content": _parts(doc["question"], images)}}]


def doc_to_visual(doc):
    return [Image.open(image).convert("RGB") for image in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"].replace(MARK, "").strip()
'''


def write_lmms_task(task: EvalTask, folder: Path) -> Path:
    """Write a task into a folder for lmms-eval's --include_path.

    Returns:
        folder of the task.

    Raises:
        ConfigError: the task's folder is there already.
    """
    place = folder / task.name
    if place.exists():
        raise ConfigError(f"{place}: exists already; remove it, or write to another folder")
    place.mkdir(parents=True)
    questions = place.resolve() / "questions.jsonl"
    rows = (
        json.dumps(_row(task.kind, question), ensure_ascii=False) for question in task.questions
    )
    questions.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    content = _YAML.format(
        name=task.name,
        questions=json.dumps(str(questions)),
        target="answers" if task.kind == "exact_match" else "answer",
        max_new_tokens=task.max_new_tokens,
        judge=_JUDGES[task.kind],
    )
    (place / f"{task.name}.yaml").write_text(content, encoding="utf-8")
    utils = _UTILS.format(imports=_IMPORTS[task.kind], mark=IMAGE_MARK)
    (place / "utils.py").write_text(utils, encoding="utf-8")
    return place


def _row(kind: Kind, question: Question) -> dict[str, Any]:
    """Row of questions.jsonl; rows of one file have the same kinds of values."""
    references = [reference.strip() for reference in question.references]
    people = [{"answer_id": number, "answer": text} for number, text in enumerate(references)]
    return {
        "question_id": str(question.question_id),
        "question": question.text,
        "images": [str(Path(str(image)).resolve()) for image in question.images],
        "past_questions": [asked for asked, _ in question.history],
        "past_answers": [answer for _, answer in question.history],
        "answer": references[0],
        "answers": people if kind == "vqa" else references,
        "category": question.kind or "",
    }
