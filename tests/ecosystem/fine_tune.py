"""Fine-tune an export in this interpreter's transformers, as its users do; prints one line a check.

    python fine_tune.py EXPORT

LoRA (peft) with Trainer, labels and gradient checkpointing; the adapter saved and loaded;
device_map with layers on the disk; bfloat16; the whole model saved and loaded.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments


def load(folder: Path, **options: Any) -> Any:
    options.setdefault("torch_dtype", torch.float32)
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)


def samples(processor: Any) -> list[dict[str, torch.Tensor]]:
    """Four questions about a colour, with labels on the answer only."""
    made = []
    for colour in ("red", "blue", "red", "blue"):
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": colour}]}
        prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
        whole = processor.apply_chat_template([asked, answer])
        assert whole.startswith(prompt)
        image = Image.new("RGB", (40, 30), colour)
        inputs = dict(processor(text=whole, images=image, return_tensors="pt"))
        start = processor(text=prompt, images=image, return_tensors="pt")["input_ids"].shape[1]
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :start] = -100
        made.append({name: value[0] for name, value in inputs.items()})
    return made


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def main(export: Path, folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    data = samples(processor)
    batch = collate(data[:1])

    def loss_of(model: Any) -> float:
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss_of(load(export))
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(load(export), config)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=8,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    tuned.enable_input_require_grads()
    Trainer(model=tuned, args=arguments, train_dataset=data, data_collator=collate).train()
    after = loss_of(tuned)
    assert after < before, (before, after)
    print(f"LoRA: loss {before:.3f} -> {after:.3f}")

    tuned.save_pretrained(folder / "adapter")
    again = loss_of(PeftModel.from_pretrained(load(export), folder / "adapter"))
    assert abs(again - after) < 1e-5, (again, after)
    print("adapter saved and loaded")

    merged = tuned.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    assert abs(loss_of(load(folder / "merged")) - after) < 1e-4
    print("merged, saved and loaded")

    size = sum(p.numel() * p.element_size() for p in load(export).parameters())
    spread = load(
        export,
        device_map="auto",
        max_memory={"cpu": int(size * 0.7)},
        offload_folder=str(folder / "offload"),
    )
    assert "disk" in set(spread.hf_device_map.values())
    assert abs(loss_of(spread) - before) < 1e-5
    print("device_map with layers on the disk")

    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert abs(loss_of(load(export, torch_dtype=torch.bfloat16)) - before) < 0.05 * before
    print("bfloat16")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(sys.argv[1]), Path(made))
