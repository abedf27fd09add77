"""Exceptions shown to the user: one clear line with the way out."""


class CrocError(ValueError):
    """Base of all errors that the user can fix.

    Control characters in the message are escaped: names in it may come from a file, and a terminal
    would obey them.
    """

    def __str__(self) -> str:
        """Return the message."""
        return printable(super().__str__())

    everywhere = False
    """True if every rank raises the same error, so that rank 0 alone reports it."""


class ConfigError(CrocError):
    """One or more settings are wrong; the message has one line per fault."""


class DataError(CrocError):
    """A sample, shard or tokenizer cannot be used; the message names it."""


class CheckpointError(CrocError):
    """A checkpoint is missing, damaged or of another model; the message names file and key."""


class RunError(CrocError):
    """The run cannot continue: a rank is lost, or too many steps in a row are not finite."""


def printable(text: str) -> str:
    """Escape the control characters of a text, except for the ends of lines and tabs."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def one_line(text: str) -> str:
    """Escape the control characters of a text, ends of lines and tabs too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def first_line(error: BaseException) -> str:
    """First line of an error's message; the name of its type if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)
