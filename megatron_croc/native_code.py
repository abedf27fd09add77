"""C++ sources of this package: compiled at their first use, kept for the runs that follow."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.errors import first_line

COMPILERS = ("c++", "g++", "clang++")
"""Names that are tried after $CXX."""

TIMEOUT = 180
"""Longest compilation in seconds."""


class CompileError(Exception):
    """A source cannot be compiled; the message says why, in one line."""


def cache_folder() -> Path:
    """Folder of what is kept between runs: $XDG_CACHE_HOME/megatron_croc, or ~/.cache/..."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "megatron_croc"


def compile_library(source: Path, options: Sequence[str], made_for: str) -> Path:
    """Path of the shared library of a source; compiles it unless the cache has it.

    Args:
        source: a C++ file.
        options: arguments of the compiler that follow the source.
        made_for: what else the result depends on, such as a version or a processor.

    Raises:
        CompileError: no C++ compiler, or it fails.
    """
    about = "\0".join((*options, made_for)).encode()
    key = hashlib.sha256(source.read_bytes() + about).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    names = [os.environ["CXX"]] if "CXX" in os.environ else list(COMPILERS)
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise CompileError(f"no C++ compiler is installed ({', '.join(names)})")
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    command = [compiler, "-shared", "-fPIC", str(source), "-o", str(partial), *options]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
        partial.replace(target)  # several processes may compile it at once
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        reason = lines[0] if lines else f"status {error.returncode}"
        raise CompileError(f"{compiler} cannot compile {source.name}: {reason}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{compiler}: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target
