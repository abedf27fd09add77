"""An export loaded by two versions of transformers: keys, logits and generated text compared.

    croc parity transformers EXPORT --python OTHER_PYTHON

EXPORT is a default export (croc convert export). OTHER_PYTHON is the interpreter of an
environment with that version, for example

    python -m venv other && other/bin/pip install torch 'transformers==4.57.*' pillow sentencepiece

Each of the two loads EXPORT through AutoModelForImageTextToText and its own code, and says which
keys are missing or unexpected, the logits of a fixed prompt with an image, and what it generates.
EXPORT's code is run: check your own exports only. Exits with 1 where the two differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_croc.config.parser import CommandParser

BOUND = 1e-5
"""Largest difference of a float32 logit: another version may order its sums otherwise."""

NEW_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 1 where the two differ or one of them fails."""
    parser = CommandParser(
        prog="croc parity transformers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", type=Path, metavar="EXPORT")
    parser.add_argument("--python", default=sys.executable, help="the other interpreter")
    parser.add_argument("--observe", type=Path, help=argparse.SUPPRESS)  # what each side runs
    arguments = parser.parse_args(argv)
    if arguments.observe is not None:
        arguments.observe.write_text(json.dumps(observe(arguments.export)))
        return 0
    if not (arguments.export / "modeling_croc.py").is_file():
        print(f"error: {arguments.export}: is no export with its own code", file=sys.stderr)
        return 1
    seen = []
    for interpreter in (sys.executable, arguments.python):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [interpreter, "-W", "ignore", __file__, str(arguments.export)]
            try:
                done = subprocess.run(
                    [*command, "--observe", file.name], capture_output=True, text=True, check=False
                )
            except OSError as error:
                print(f"error: --python {interpreter}: {error.strerror}", file=sys.stderr)
                return 1
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"error: {interpreter}: {last}", file=sys.stderr)
                return 1
            seen.append(json.loads(Path(file.name).read_text()))
    return 0 if compare(*seen) else 1


def compare(here: dict, there: dict) -> bool:
    """Print what was seen; whether it is the same."""
    for side in (here, there):
        faults = ", ".join(f"{len(side[k])} {k}" for k in ("missing", "unexpected", "mismatched"))
        print(f"transformers {side['version']}: {faults}; generated {side['generated']}")
    pairs = zip(here["logits"], there["logits"], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    print(f"largest difference of a logit {difference:.1e}, the bound is {BOUND:g}")
    complete = not any(s[k] for s in (here, there) for k in ("missing", "unexpected", "mismatched"))
    same = difference <= BOUND and here["generated"] == there["generated"]
    print("PASSED" if complete and same else "FAILED")
    return complete and same


def observe(export: Path) -> dict:
    """Load, compute and generate with the transformers at hand."""
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
    return {
        "version": transformers.__version__,
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "logits": logits.flatten().tolist(),
        "generated": said[:, ids.shape[1] :].tolist(),
    }


if __name__ == "__main__":
    sys.exit(main())
