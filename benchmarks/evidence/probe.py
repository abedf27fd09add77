#!/usr/bin/env python
"""Content of the image positions of finished arms, by layer, and attention of answers to them.

    python benchmarks/evidence/probe.py benchmarks/evidence/easy_vqa.yaml --out runs/evidence \\
        --data runs/evidence/data

The probe is linear (ridge regression on the mean hidden state of a picture's image positions to its
colour or shape), fitted on training pictures and counted on test pictures. Attention is that of the
prompt's last position, mean over heads. Both are of the last stage's model, which is causal: the
question stands after the image and cannot change its positions. Writes OUT/probe.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_croc.evaluation.questions import ask
from megatron_croc.inference.generation import Generator, open_generator
from megatron_croc.scaling.arm_launch import is_finished
from megatron_croc.scaling.arms import ArmRun, read_plan
from megatron_croc.scaling.report import markdown
from megatron_croc.scaling.statistics import mean_of

QUESTION = "what shape is in the image?"
RIDGE = 1e-2
"""Penalty, in units of the mean variance of a hidden state."""


def read_pictures(data: Path, name: str, number: int) -> tuple[list[Path], dict[str, list[str]]]:
    """Read the first pictures of a file of short captions, with colour and shape of each."""
    rows = json.loads((data / name).read_text(encoding="utf-8"))[:number]
    words = [row["caption"].rstrip(".").split() for row in rows]  # "a blue circle."
    facts = {"colour": [w[1] for w in words], "shape": [w[2] for w in words]}
    return [data / "images" / row["image"] for row in rows], facts


@torch.no_grad()
def hidden_states(
    generator: Generator, pictures: Sequence[Path], batch: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Mean hidden state of the image positions [layers + 1, n, width]; attention [layers, n]."""
    generator.model.set_attn_implementation("eager")  # the others return no attention
    states, attention = [], []
    for first in range(0, len(pictures), batch):
        questions = [ask(QUESTION, [picture]) for picture in pictures[first : first + batch]]
        inputs = generator.inputs(questions)
        is_image = inputs["input_ids"] == generator.model.config.image_token_id
        out = generator.model(**inputs, output_hidden_states=True, output_attentions=True)
        share = is_image[:, None].float() / is_image.sum(1)[:, None, None]
        states.append(torch.stack([(share @ h)[:, 0] for h in out.hidden_states]).numpy())
        to_image = [(a[:, :, -1] * is_image[:, None]).sum(-1).mean(1) for a in out.attentions]
        attention.append(torch.stack(to_image).numpy())
    return np.concatenate(states, axis=1), np.concatenate(attention, axis=1)


def probe(
    train: np.ndarray, train_labels: Sequence[str], test: np.ndarray, test_labels: Sequence[str]
) -> float:
    """Share of test rows [n, width] whose label a ridge regression on the training rows finds."""
    names = sorted(set(train_labels))
    targets = np.eye(len(names))[[names.index(label) for label in train_labels]]
    middle, scale = train.mean(0), train.std() + 1e-12
    rows, others = (train - middle) / scale, (test - middle) / scale
    gram = rows.T @ rows + RIDGE * len(rows) * np.eye(rows.shape[1])
    weights = np.linalg.solve(gram, rows.T @ (targets - targets.mean(0)))
    found = (others @ weights + targets.mean(0)).argmax(1)
    return float(np.mean([names[i] == label for i, label in zip(found, test_labels, strict=True)]))


def measure(arm: ArmRun, data: Path, *, num_train: int, num_test: int) -> dict:
    """Probe one arm and seed."""
    train, train_facts = read_pictures(data, "pretrain_mlp.json", num_train)
    test, test_facts = read_pictures(data, "valid_pretrain_mlp.json", num_test)
    last = arm.stages[-1]
    tokenizer = Path(str(last.run.data.tokenizer_model))
    with open_generator(last.checkpoints, tokenizer=tokenizer) as model:
        seen, _ = hidden_states(model, train)
        unseen, attention = hidden_states(model, test)
    accuracies = {
        fact: [
            probe(a, train_facts[fact], b, test_facts[fact])
            for a, b in zip(seen, unseen, strict=True)
        ]
        for fact in ("colour", "shape")
    }
    mean = attention.mean(1).tolist()
    return {"arm": arm.arm, "seed": arm.seed, **accuracies, "attention_to_image": mean}


def table(rows: Sequence[dict]) -> list[list[str]]:
    """Mean and standard error over seeds; layer 0 is the projector's output."""
    num_layers = len(rows[0]["attention_to_image"])
    head = [f"{fact}, layer {n}" for fact in ("colour", "shape") for n in range(num_layers + 1)]
    attention = [f"attention, layer {n + 1}" for n in range(num_layers)]
    lines = [["arm", "seeds", *head, *attention]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [r for r in rows if r["arm"] == arm]
        cells = []
        for key in ("colour", "shape", "attention_to_image"):
            for values in zip(*(row[key] for row in own), strict=True):
                mean = mean_of(values)
                error = f" ± {100 * mean.error:.1f}" if mean.num_seeds > 1 else ""
                cells.append(f"{mean.value:.1%}{error}")
        lines.append([arm, str(len(own)), *cells])
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Probe every finished arm that was not probed yet; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="the plan of arms")
    parser.add_argument("--out", type=Path, required=True, help="folder of its runs")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--num-train", type=int, default=800, help="pictures the probe is fitted on"
    )
    parser.add_argument("--num-test", type=int, default=400)
    options = parser.parse_args(argv)
    plan, path = read_plan(options.plan, options.out, data=options.data), options.out / "probe.json"
    rows: list[dict] = json.loads(path.read_text()) if path.exists() else []
    known = {(row["arm"], row["seed"]) for row in rows}
    for arm in plan.runs:
        if is_finished(arm) and (arm.arm, arm.seed) not in known:
            rows.append(
                measure(arm, options.data, num_train=options.num_train, num_test=options.num_test)
            )
            path.write_text(json.dumps(rows, indent=1) + "\n")
    print(markdown(table(rows)))


if __name__ == "__main__":
    main()
