"""Model card of an export (README.md): origin, settings and digests of its files."""

from pathlib import Path

from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.run import RunConfig

_LOADING = {
    "croc": """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
question = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True
)
inputs = processor(text=prompt, images=image, return_tensors="pt")
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

`trust_remote_code` is needed because LLaVA does not give visual tokens unit length; it refuses this
folder. With vLLM: `pip install --no-deps megatron-croc`, then `vllm serve FOLDER`.""",
    "release": "In the layout of the released Croc and LLaVA-1.5 code, which loads it.",
}


def write_model_card(
    folder: Path, run: RunConfig, state: TrainState, digests: dict[str, str], layout: str
) -> None:
    """Write README.md beside the weights.

    Args:
        folder: folder of the export.
        run: the run that wrote the checkpoint.
        state: training state of that run.
        digests: file name -> SHA-256.
        layout: `croc` or `release`.
    """
    model, data = run.model, run.data
    facts = {
        "stage": run.stage,
        "iteration": f"{state.iteration:,}",
        "samples seen in that stage": f"{state.consumed_samples:,}",
        "training data": ", ".join(Path(path).name for path in data.data_path) or "not recorded",
        "conversation template": data.conversation_template,
        "attention mask in training": model.attention_mask_type,
        "learning rate": f"{run.optimizer.lr:g}",
        "global batch size": str(run.training.global_batch_size),
        "language model": f"{model.language_model.num_layers} layers of "
        f"{model.language_model.hidden_size}",
        "vision tower": f"{model.vision_tower.vision_model_type}, "
        f"{model.vision_tower.img_size} pixels, {model.vision_tower.num_visual_tokens} tokens",
    }
    lines = [
        "---",
        "pipeline_tag: image-text-to-text",
        "library_name: transformers",
        "---",
        "",
        "# Croc",
        "",
        "Trained with megatron_croc after Croc (arXiv 2410.14332).",
        "",
        _LOADING[layout],
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "| file | SHA-256 |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in digests.items()),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
