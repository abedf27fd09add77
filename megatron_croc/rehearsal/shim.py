"""The C++ part of the fake device: compiled once for each version of torch, then loaded."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from megatron_croc.errors import first_line
from megatron_croc.rehearsal.cache import cache_folder

SOURCE = Path(__file__).with_name("fake_cuda.cpp")

COMPILERS = ("c++", "g++", "clang++")
"""Names that are tried after $CXX."""

TIMEOUT = 180
"""Longest compilation in seconds (it takes about 20)."""


class ShimError(Exception):
    """The shim cannot be built or loaded; the message says why, in one line."""


def build_shim() -> Path:
    """Path of the compiled shim; compiles it if this torch has none yet.

    Raises:
        ShimError: no C++ compiler, or it fails.
    """
    about = f"{torch.__version__} {sys.version} {torch.compiled_with_cxx11_abi()}"
    key = hashlib.sha256(SOURCE.read_bytes() + about.encode()).hexdigest()[:16]
    target = cache_folder() / f"fake_cuda-{key}.so"
    if target.exists():
        return target
    names = [os.environ["CXX"]] if "CXX" in os.environ else list(COMPILERS)
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise ShimError(f"no C++ compiler is installed ({', '.join(names)})")
    base = Path(torch.__file__).parent
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    command = [
        *(compiler, "-O1", "-std=c++20", "-shared", "-fPIC"),
        *(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",),
        *(f"-I{base / 'include'}", str(SOURCE), "-o", str(partial)),
        *(f"-L{base / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
        partial.replace(target)  # several processes may compile it at once
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        reason = lines[0] if lines else f"status {error.returncode}"
        raise ShimError(f"{compiler} cannot compile {SOURCE.name}: {reason}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ShimError(f"{compiler}: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def load_shim() -> None:
    """Give this process a CUDA device that does nothing.

    Raises:
        ShimError: it cannot be built or loaded.
    """
    try:
        installed = ctypes.CDLL(str(build_shim())).install_fake_cuda()
    except OSError as error:
        raise ShimError(
            f"the compiled {SOURCE.name} cannot be loaded: {first_line(error)}"
        ) from error
    if installed != 1:
        raise ShimError(f"torch {torch.__version__} does not take the device of {SOURCE.name}")
