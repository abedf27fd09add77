"""Train a small tokenizer from the texts of records, for trials and models trained from scratch.

    croc data tokenizer --input captions.json questions.json --output tokenizer.model
    croc data tokenizer --input captions.jsonl --vocab-size 4096 --output tokenizer.model

A run that starts from a pretrained language model takes that model's own tokenizer and never one
from here: its weights belong to its ids. The result is a SentencePiece model with LLaMA's settings
(BPE, single digits, bytes for unknown characters). The `tiny` recipes have room for 512 ids; for
more, give the trainer the same --vocab-size. --input is read as by `croc data preprocess`.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_croc.atomic_files import write_atomically
from megatron_croc.cli.outputs import refuse_unwritable
from megatron_croc.config.parser import CommandParser
from megatron_croc.data.prepare.inputs import FORMATS, open_input
from megatron_croc.data.records.reading import texts_of
from megatron_croc.data.sample.tokenizer_training import PROMPT, train_sentencepiece
from megatron_croc.errors import ConfigError, DataError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="croc data tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, help="files of records")
    parser.add_argument("--input-format", choices=FORMATS, help="default: told by the suffix")
    parser.add_argument("--vocab-size", type=int, default=512, help="ids at most (default 512)")
    parser.add_argument(
        "--max-records", type=int, default=100_000, help="read no more (default 100000)"
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write; must not exist")
    return parser.parse_args(argv)


def read_texts(arguments: argparse.Namespace) -> Iterator[str]:
    """Texts of every record, and the prompt that training puts before each conversation."""
    left = arguments.max_records
    for path in arguments.input:
        source = open_input([path], arguments.input_format)
        count = min(left, source.num_records)
        if count == 0:  # an empty file, or enough read
            continue
        left -= count
        for found in source.slice(0, count).read():
            if texts := texts_of(found.record):  # a damaged record has none
                yield PROMPT
                yield from texts


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write; prints the number of ids."""
    arguments = parse_arguments(argv)
    output = arguments.output
    if output.exists():  # trained weights may depend on it
        raise ConfigError(f"--output {output}: exists already; remove it or name another")
    refuse_unwritable("--output", output.parent)
    try:
        model = train_sentencepiece(read_texts(arguments), arguments.vocab_size)
    except DataError as error:
        raise DataError(f"{', '.join(arguments.input)}: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, model)
    print(f"{output}: {num_ids(model)} ids")
    return 0


def num_ids(model: bytes) -> int:
    """Number of ids of a SentencePiece model."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
