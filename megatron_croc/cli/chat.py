"""Talk to a trained model in the terminal, or on a page in the browser of this machine.

    croc chat --model runs/finetune --image a.jpg
    croc chat --model croc-hf --web --port 7860

`--model` is as in `croc generate`. In the terminal: /image PATH shows an image with the next
question, /reset starts anew, /quit ends; Ctrl-C stops an answer, Ctrl-D ends. When the input is not
a terminal, each line is a question. The page is bound to 127.0.0.1.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_croc.cli.errors import print_error, reports_errors
from megatron_croc.cli.model_options import add_model_options, open_model
from megatron_croc.config.parser import CommandParser
from megatron_croc.errors import ConfigError, CrocError, DataError

if TYPE_CHECKING:
    from megatron_croc.inference.chat import Conversation


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Hold a conversation; return the exit status."""
    return _run(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="croc chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_options(parser)
    add("--image", type=Path, action="append", default=[], help="for the first question")
    add("--web", action="store_true", help="a page in the browser instead of the terminal")
    add("--port", type=int, default=7860, help="of the page (default 7860); 0: any free port")
    add("--max-new-tokens", type=int, default=512)
    add("--temperature", type=float, default=0.0, help="default 0: the most likely token")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--seed", type=int, default=1234)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.web and arguments.image:
        raise ConfigError("--image is for the terminal; add images on the page of --web")
    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"--port {arguments.port}: must be from 0 to 65535")
    images = [(str(path), _read(path)) for path in arguments.image]
    from megatron_croc.inference.chat import Conversation
    from megatron_croc.inference.generation import Sampling

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    if arguments.web:  # a missing library or a taken port is found before the model is loaded
        from megatron_croc.inference.chat_page import build_app, listen, serve

        socket = listen(arguments.port)
    with open_model(arguments) as generator:
        if arguments.web:
            serve(build_app(generator, sampling), socket)
            return 0
        conversation = Conversation(generator, sampling)
        for name, content in images:
            conversation.add_image(name, content)
        return _talk(conversation)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path}: {error.strerror}: give the path of an image") from error


def _talk(conversation: "Conversation") -> int:
    """Answer each line; 1 when the input is not a terminal and a line had a fault."""
    status = 0
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _obey(conversation, line):
                    return status
            elif line:
                _answer(conversation, line)
        except CrocError as error:
            print_error(error)
            status = 0 if sys.stdin.isatty() else 1
    return status


def _lines() -> Iterator[str]:
    """Stripped lines of the input, with a prompt on a terminal, until it ends."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    import readline  # noqa: F401 - line editing and history for input()

    print("/image PATH, /reset, /quit; Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


def _obey(conversation: "Conversation", line: str) -> bool:
    """Run a command; False: end the conversation."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/image" and rest.strip():
        path = Path(rest.strip()).expanduser()
        conversation.add_image(str(path), _read(path))
    else:
        raise ConfigError(f"{command}: the commands are /image PATH, /reset and /quit")
    return True


def _answer(conversation: "Conversation", text: str) -> None:
    """Print an answer as it arrives; Ctrl-C stops it."""
    try:
        with closing(conversation.ask(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
        if not sys.stdin.isatty():
            raise
    finally:
        print(flush=True)
