"""The C++ part of the fake device: compiled once for each version of torch, then loaded."""

import ctypes
import sys
from pathlib import Path

import torch

from megatron_croc.errors import first_line
from megatron_croc.native_code import CompileError, compile_library

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


class ShimError(Exception):
    """The shim cannot be built or loaded; the message says why, in one line."""


def build_shim() -> Path:
    """Path of the compiled shim; compiles it (about 20 seconds) if this torch has none yet.

    Raises:
        ShimError: no C++ compiler, or it fails.
    """
    base = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    options = [
        *("-O1", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-I{base / 'include'}"),
        *(f"-L{base / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    try:
        return compile_library(SOURCE, options, f"{torch.__version__} {sys.version}")
    except CompileError as error:
        raise ShimError(str(error)) from error


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
