"""Look at a dataset before training: what is in it, what is cut off, repeated, bad or strange.

    croc data check data/captions --recipe croc_7b/pretrain_croc --tokenizer-model tokenizer.model
    croc data check data/chat data/docs --tokenizer-model tokenizer.model --seq-length 4096 \\
        --out look --compare earlier/check.json

Samples are read, cut and decoded as the run would. --out gets check.html, one page with the
strangest samples as the model will see them, and check.json; --compare prints what has changed
since another look. Folders of more than --max-samples samples are looked at in part, and the page
says so. Without --recipe the run is croc_7b/finetune. Any setting of the trainer may be given.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_croc.cli.outputs import refuse_unwritable
from megatron_croc.data.store.manifest import count_samples
from megatron_croc.errors import ConfigError
from megatron_croc.recipes.command_line import parse_command, run_parser

DEFAULT_RECIPE = "croc_7b/finetune"


def main(argv: Sequence[str] | None = None) -> int:
    """Look, write page and JSON, and print the main lines."""
    parser = run_parser(prog="croc data check", description=__doc__ or "")
    parser.add_argument("--out", type=Path, default=Path("data_check"), metavar="FOLDER")
    parser.add_argument("--compare", type=Path, metavar="check.json", help="of an earlier look")
    parser.add_argument(
        "--max-samples", type=int, default=2000, help="samples looked at; 0: all (default 2000)"
    )
    parser.add_argument("--strangest", type=int, default=20, help="samples shown (default 20)")
    words = list(sys.argv[1:] if argv is None else argv)
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    words = words[len(folders) :]
    names = {word.split("=")[0] for word in words}
    if not folders and names.isdisjoint(("-h", "--help", "--data-path", "--config")):
        raise ConfigError("name the dataset folders first: croc data check FOLDER --recipe ...")
    if names.isdisjoint(("--recipe", "--config")):
        words = ["--recipe", DEFAULT_RECIPE, *words]
    options, run = parse_command(parser, words)
    run.data.data_path = tuple(folders) or run.data.data_path
    if not run.data.data_path:
        raise ConfigError("data_path is empty: name the dataset folders first")
    if run.data.tokenizer_model is None:
        raise ConfigError("--tokenizer-model is not given: tokens are counted with it")
    if options.max_samples < 0 or options.strangest < 0:
        raise ConfigError("--max-samples and --strangest must not be negative")
    refuse_unwritable("--out", options.out)
    from megatron_croc.data.look.look import look_at  # torch: not before the settings are checked

    total = count_samples(run.data.data_path)
    number = min(total, options.max_samples) if options.max_samples else total
    with tqdm(total=number, unit="sample", disable=None) as progress:
        look = look_at(
            run,
            options.out,
            max_samples=options.max_samples,
            num_strangest=options.strangest,
            compare=options.compare,
            progress=progress.update,
        )
    survey = look.survey
    part = "" if number == total else f" ({number} looked at, evenly spread)"
    tokens = survey["tokens"]
    print(
        f"{total} samples{part}: {survey['text_only_share']:.1%} text only; tokens median "
        f"{tokens.get('50', 0)}, 99% below {tokens.get('99', 0)}, seq_length "
        f"{survey['seq_length']}"
    )
    for line in look.warnings:
        print(f"warning: {line}")
    for line in look.changes if look.changes is not None else ():
        print(f"changed: {line}")
    if look.changes == []:
        print(f"nothing changed since {options.compare}")
    print(look.page)
    return 0
