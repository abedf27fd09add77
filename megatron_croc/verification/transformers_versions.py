"""An export loaded by two versions of transformers: keys, prompts, logits and answers compared.

    croc parity transformers EXPORT --python OTHER_PYTHON

EXPORT is a default export (croc convert export). OTHER_PYTHON is the interpreter of an
environment with that version, for example

    python -m venv other && other/bin/pip install torch 'transformers==4.57.*' pillow

Each of the two loads EXPORT as its users do: model, processor and chat template through the Auto
classes. Compared are missing and unexpected keys, the logits of a fixed prompt with an image, the
ids of conversations (with training's, too) and the answers to them. All of it is done again after
save_pretrained. EXPORT's code is run: check your own exports only. Exits with 1 if any differ.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BOUND = 1e-5
"""Largest difference of a float32 logit: another version may order its sums otherwise."""

NEW_TOKENS = 16

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "Is there a red circle?"}
CONVERSATIONS: list[list[tuple[str, list[dict[str, str]]]]] = [
    [("user", [IMAGE, TEXT])],
    [("user", [TEXT, IMAGE])],
    [("user", [IMAGE, IMAGE, TEXT])],
    [("user", [{"type": "text", "text": "Compare "}, IMAGE, TEXT, IMAGE, TEXT])],
    [("user", [IMAGE, TEXT]), ("assistant", [{"type": "text", "text": "yes"}]), ("user", [TEXT])],
    [("user", [{"type": "text", "text": "What does </s> mean?"}])],
]
"""Messages (role, parts); template `plain` gets only those of one message."""

Observation = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; return 1 if the two differ or one of them fails."""
    # Not above: the other interpreter runs this file without this package.
    from megatron_croc.config.parser import CommandParser

    parser = CommandParser(
        prog="croc parity transformers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", type=Path, metavar="EXPORT")
    parser.add_argument("--python", default=sys.executable, help="the other interpreter")
    arguments = parser.parse_args(argv)
    if not (arguments.export / "modeling_croc.py").is_file():
        print(f"error: {arguments.export}: is no export with its own code", file=sys.stderr)
        return 1
    seen = []
    for interpreter in (sys.executable, arguments.python):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [interpreter, "-W", "ignore", __file__, str(arguments.export)]
            environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
            try:
                done = subprocess.run(
                    [*command, file.name],
                    capture_output=True,
                    text=True,
                    check=False,
                    env=environment,
                )
            except OSError as error:
                print(f"error: --python {interpreter}: {error.strerror}", file=sys.stderr)
                return 1
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"error: {interpreter}: {last}", file=sys.stderr)
                return 1
            seen.append(json.loads(Path(file.name).read_text()))
    return 0 if compare(*seen, training=training_prompts(arguments.export)) else 1


def compare(here: Observation, there: Observation, *, training: list[list[int]] | None) -> bool:
    """Print both observations; return True if they agree with each other and with training.

    Args:
        here: of `observe`, under this version.
        there: the same under the other.
        training: ids of CONVERSATIONS; None: the export has no tokenizer.
    """
    faults = []
    for side in (here, there):
        for name in ("loaded", "saved again"):
            seen = side[name]
            where = f"transformers {side['version']}, {name}"
            keys = ", ".join(f"{len(seen[k])} {k}" for k in ("missing", "unexpected", "mismatched"))
            right = sum(a == b for a, b in zip(seen["prompts"], training or [], strict=False))
            told = f"{right} of {len(training)} prompts as in training" if training else "no prompt"
            print(f"{where}: {keys}; {told}; generated {seen['generated']}")
            if keys != "0 missing, 0 unexpected, 0 mismatched":
                faults.append(f"{where}: keys")
            if training is not None and seen["prompts"] != training:
                faults.append(f"{where}: other prompts than in training")
            pairs = zip(here["loaded"]["logits"], seen["logits"], strict=True)
            differences = [abs(a - b) for a, b in pairs]
            if not all(difference <= BOUND for difference in differences):  # NaN is not, either
                difference = max(differences)
                faults.append(f"{where}: logits differ by {difference:.1e}, bound {BOUND:g}")
            if [here["loaded"][k] for k in ("generated", "answers")] != [
                seen[k] for k in ("generated", "answers")
            ]:
                faults.append(f"{where}: other answers")
    for fault in faults:
        print(fault)
    print("FAILED" if faults else "PASSED")
    return not faults


def training_prompts(export: Path) -> list[list[int]] | None:
    """Return the ids that training gives CONVERSATIONS; None if the export has no tokenizer."""
    from megatron_croc.convert.configs import read_conversation, read_export
    from megatron_croc.convert.exported_tokenizer import is_own_tokenizer, read_exported
    from megatron_croc.convert.tensor_files import read_json
    from megatron_croc.data.batch import IMAGE_TOKEN_INDEX
    from megatron_croc.data.sample.tokenization import build_tokenizer, tokenize_prompt

    if not is_own_tokenizer(export):
        return None
    template = read_conversation(export).conversation_template
    model = export / "tokenizer.model"
    tokenizer = (
        build_tokenizer("SentencePieceTokenizer", str(model))
        if model.is_file()
        else read_exported(export)
    )
    count = read_export(export).vision_tower.num_visual_tokens
    image = read_json(export / "config.json")["image_token_index"]
    prompts = []
    for messages in conversations(template):
        values = [_training_value(parts) for _, parts in messages]
        history = list(zip(values[:-1:2], values[1::2], strict=True))
        ids = tokenize_prompt(tokenizer, template, values[-1], history=history).tolist()
        prompts.append(
            [id for i in ids for id in ([image] * count if i == IMAGE_TOKEN_INDEX else [i])]
        )
    return prompts


def conversations(template: str) -> list[list[tuple[str, list[dict[str, str]]]]]:
    """Return the CONVERSATIONS that a template can express."""
    return [c for c in CONVERSATIONS if template != "plain" or len(c) == 1]


def _training_value(parts: list[dict[str, str]]) -> str:
    """Write parts as LLaVA's text; images all before or after the text stand before it."""
    kinds = "".join("i" if part == IMAGE else "t" for part in parts)
    if re.fullmatch("i*t*|t*i*", kinds):
        return "<image>\n" * kinds.count("i") + "".join(part.get("text", "") for part in parts)
    return "".join(part.get("text", "<image>") for part in parts)


def observe(export: Path) -> Observation:
    """Load, compute and generate with this interpreter's transformers, twice: once saved again."""
    import transformers

    seen: Observation = {"version": transformers.__version__}
    with tempfile.TemporaryDirectory(prefix="croc-saved-again-") as again:
        seen["loaded"] = _observe(export, save=Path(again))
        seen["saved again"] = _observe(Path(again), save=None)
    return seen


def _observe(export: Path, *, save: Path | None) -> Observation:
    import torch
    import transformers

    load: Any = transformers.AutoModelForImageTextToText.from_pretrained
    model, info = load(
        export, trust_remote_code=True, output_loading_info=True, torch_dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    config = model.config
    num_tokens, size = config.image_seq_length, config.vision_config.image_size
    words = torch.randint(3, 100, (2, 12), generator=generator)
    image = torch.full((2, num_tokens), config.image_token_index)
    ids = torch.cat([words[:, :4], image, words[:, 4:]], dim=1)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with torch.no_grad():
        logits = model(**inputs).logits[:, -8:]
        said = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    prompts, answers = _answer(model, export, save)
    if save is not None:
        model.save_pretrained(save)
    return {
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "logits": logits.flatten().tolist(),
        "generated": said[:, ids.shape[1] :].tolist(),
        "prompts": prompts,
        "answers": answers,
    }


def _answer(model: Any, export: Path, save: Path | None) -> tuple[list[list[int]], list[str]]:
    """Return ids of prompts and answers of CONVERSATIONS, as the processor makes them."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor

    if not (export / "chat_template.jinja").is_file():
        return [], []
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    if save is not None:
        processor.save_pretrained(save)
    colours = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    prompts, answers = [], []
    for messages in conversations(model.config.croc_conversation["conversation_template"]):
        chat = [{"role": role, "content": parts} for role, parts in messages]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        count = sum(part == IMAGE for _, parts in messages for part in parts)
        # As users call it: no option that says how the text begins.
        inputs = processor(text=text, images=colours[:count] or None, return_tensors="pt")
        with torch.no_grad():
            rows = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        prompts.append(inputs["input_ids"][0].tolist())
        answers.append(
            processor.decode(rows[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return prompts, answers


if __name__ == "__main__":  # run by each of the two interpreters
    Path(sys.argv[2]).write_text(json.dumps(observe(Path(sys.argv[1]))))
