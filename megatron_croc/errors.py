"""Exception types that reach the user: one clear line, and the way out."""


class CrocError(ValueError):
    """Base of every error caused by input the user can mend."""


class ConfigError(CrocError):
    """One or more settings are wrong; the message lists every fault, a line each."""


class DataError(CrocError):
    """A sample, shard or tokenizer is not what training needs; the message names it."""


class CheckpointError(CrocError):
    """A checkpoint is missing, damaged or of another model; the message names file and key."""


class RunError(CrocError):
    """The run itself cannot go on: a rank is lost, or step after step is not finite."""


def first_line(error: BaseException) -> str:
    """What an error says first; its kind, where it says nothing (an EOFError)."""
    return next(iter(str(error).splitlines()), type(error).__name__)
