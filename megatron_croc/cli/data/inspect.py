"""Show samples as the model will see them: tokens, labels, pixels, mask.

    croc data inspect --recipe croc_7b/pretrain_croc --data-path data/captions \\
        --tokenizer-model tokenizer.model --samples 0 17 captions/000002-000041 --out look

Samples are named by number or by key, as logs and reports of bad samples name them. In the terminal
supervised tokens are green, the rest is grey, and each image is one block; a dot is a space.
--out writes index.html with the same, the preprocessed images and the masks, and each as a PNG.
Any setting of the trainer may be given; nothing is shuffled here.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.cli.outputs import refuse_unwritable
from megatron_croc.recipes.command_line import parse_command, run_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Show the samples asked for."""
    parser = run_parser(prog="croc data inspect", description=__doc__ or "")
    parser.add_argument(
        "--samples", nargs="+", default=["0", "1", "2"], metavar="S", help="numbers or keys"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a page and pictures")
    parser.add_argument("--plain", action="store_true", help="no colours; [..] is supervised")
    options, run = parse_command(parser, argv)
    from megatron_croc.data.sample_view import as_text, view_samples, write_page

    if options.out is not None:
        refuse_unwritable("--out", options.out)
    views = view_samples(run, options.samples)
    for view in views:
        print(as_text(view, colour=sys.stdout.isatty() and not options.plain))
    if options.out is not None:
        print(write_page(views, options.out))
    return 0
