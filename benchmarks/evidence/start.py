#!/usr/bin/env python
"""Initial weights of one seed: a random language model beside the trained tower.

    python benchmarks/evidence/start.py --seed 1 --out data/easy_vqa/start/seed-1/language_model
    croc convert import --from-hf data/easy_vqa/start/seed-1/language_model \\
        --vision data/easy_vqa/tower --save data/easy_vqa/start/seed-1 --seed 1

All arms of a seed start from the same weights. Needs transformers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(vocab_size: int, width: int, num_layers: int) -> LlamaForCausalLM:
    """Build a random language model with heads of 16 numbers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write a language model in Hugging Face's layout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, default=512, help="ids of the tokenizer")
    parser.add_argument("--width", type=int, default=64, help="a multiple of 16")
    parser.add_argument("--num-layers", type=int, default=3)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    build(options.vocab_size, options.width, options.num_layers).save_pretrained(options.out)


if __name__ == "__main__":
    main()
