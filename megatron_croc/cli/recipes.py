"""List the recipes: croc recipes

Each is a complete configuration; `croc check --recipe NAME/STAGE` shows one in full.
"""

import argparse
from collections.abc import Sequence

from megatron_croc.config.parser import CommandParser
from megatron_croc.recipes import get_recipe, list_recipes


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each recipe."""
    CommandParser(
        prog="croc recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    for name in list_recipes():
        run = get_recipe(name)
        model, vision = run.model.language_model, run.model.vision_tower
        print(
            f"{name:<24}  {model.num_layers} layers of {model.hidden_size}, "
            f"{vision.num_visual_tokens} visual tokens, mask {run.model.attention_mask_type}, "
            f"batch {run.training.global_batch_size} of {run.data.seq_length}"
        )
    return 0
